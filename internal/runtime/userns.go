package runtime

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"conex/internal/linux/nsfork"
	"conex/internal/linux/userns"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A container with a user namespace is made by the same thread as any other. A process of many threads can't enter a user namespace,
// so the thread stays in the host's, with all of its capabilities, and enters only namespaces that belong to the new one: a helper of
// a few system calls makes them (package userns), the thread joins them. It makes files as the container's root meanwhile. The forked
// child, which has one thread, enters the user namespace first of all, forks once more so that the pid namespace belongs to it too,
// and becomes its root:
//
//	thread (host's ids)      holder: clone3(user, net, mount, ipc, uts)      maps written, namespaces joined, holder ends
//	                         mounts, as host's root, files as the container's
//	first child              limits that only the host's root may raise; setns(user); fork(pid)
//	second child             setgroups, setresgid, setresuid to 0; /proc; the old root goes; then as ever
type userNamespace struct {
	file           *os.File
	uidMap, gidMap userns.Map
}

// mapping is the namespace as idmapped mounts take it; nil without one.
func (u *userNamespace) mapping() *os.File {
	if u == nil {
		return nil
	}
	return u.file
}

func (u *userNamespace) uids() userns.Map {
	if u == nil {
		return nil
	}
	return u.uidMap
}

func (u *userNamespace) gids() userns.Map {
	if u == nil {
		return nil
	}
	return u.gidMap
}

// uid and gid return what an id of the container is on the host: itself without a user namespace. An id that is not mapped is -1,
// "nobody", for what is only given away, and an error for who asks.
func (u *userNamespace) uid(id uint32) int { return u.outside(id, false) }
func (u *userNamespace) gid(id uint32) int { return u.outside(id, true) }

func (u *userNamespace) outside(id uint32, group bool) int {
	if u == nil {
		return int(id)
	}
	m := u.uidMap
	if group {
		m = u.gidMap
	}
	if out, ok := m.Outside(id); ok {
		return int(out)
	}
	return -1
}

// check refuses a user whose ids the namespace has not, which the kernel would say as "invalid argument".
func (u *userNamespace) check(user User) error {
	if u == nil {
		return nil
	}
	if u.uid(user.UID) < 0 {
		return fmt.Errorf("user %d: the container's user namespace does not have it, but ids below %d", user.UID, end(u.uidMap))
	}
	for _, g := range append([]uint32{user.GID}, user.Groups...) {
		if u.gid(g) < 0 {
			return fmt.Errorf("group %d: the container's user namespace does not have it, but ids below %d", g, end(u.gidMap))
		}
	}
	return nil
}

func end(m userns.Map) uint64 {
	var n uint64
	for _, r := range m {
		n = max(n, uint64(r.Inside)+uint64(r.Size))
	}
	return n
}

func (u *userNamespace) close() {
	if u != nil {
		u.file.Close()
	}
}

// openUserNamespace is that of a running container.
func openUserNamespace(pid int) (*userNamespace, error) {
	uids, gids, err := userns.MapsOf(pid)
	if err != nil {
		return nil, fmt.Errorf("open container's user namespace: %w", err)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	if err != nil {
		return nil, fmt.Errorf("open container's user namespace: %w", err)
	}
	return &userNamespace{f, uids, gids}, nil
}

// checkMappings looks at what a spec says about ids before anything is made.
func checkMappings(l *specs.Linux) error {
	i := slices.IndexFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace })
	mapped := len(l.UIDMappings) > 0 && len(l.GIDMappings) > 0
	switch {
	case i < 0 && len(l.UIDMappings)+len(l.GIDMappings) > 0:
		return errors.New("create container: id mappings without a user namespace")
	case i < 0 || l.Namespaces[i].Path != "":
		return nil
	case !mapped:
		return errors.New("create container: a user namespace without id mappings")
	}
	for _, m := range [][]specs.LinuxIDMapping{l.UIDMappings, l.GIDMappings} {
		if _, ok := idMap(m).Outside(0); !ok {
			return errors.New("create container: the user namespace does not map id 0")
		}
	}
	return nil
}

func idMap(ms []specs.LinuxIDMapping) userns.Map {
	var out userns.Map
	for _, m := range ms {
		out = append(out, userns.Range{Inside: m.ContainerID, Outside: m.HostID, Size: m.Size})
	}
	return out
}

// enterUserNamespaces is enterNamespaces for a container with a user namespace.
func (b *box) enterUserNamespaces(r *rootfs) error {
	l := b.cfg.Spec.Linux
	flags := b.flags &^ (unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWCGROUP | unix.CLONE_NEWTIME)
	u := &userNamespace{uidMap: idMap(l.UIDMappings), gidMap: idMap(l.GIDMappings)}
	var h *userns.Holder
	var err error
	if b.userPath != "" {
		if u.file, err = os.Open(b.userPath); err != nil {
			return fmt.Errorf("join user namespace: %w", err)
		}
		if h, err = userns.Join(u.file, uint64(flags)); err != nil {
			u.close()
			return err
		}
		if u.uidMap, u.gidMap, err = h.Maps(); err == nil && (u.uid(0) < 0 || u.gid(0) < 0) {
			err = fmt.Errorf("join user namespace %s: it does not map id 0", b.userPath)
		}
	} else {
		if h, err = userns.New(uint64(flags), u.uidMap, u.gidMap); err != nil {
			return err
		}
		u.file, err = h.Namespace("user")
	}
	defer h.Close()
	if err != nil {
		if u.file != nil {
			u.close()
		}
		return err
	}
	b.mu.Lock()
	b.user = u
	b.mu.Unlock()
	r.users = u
	if err := b.joinNamespaces(); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_FS | b.flags&unix.CLONE_NEWTIME); err != nil {
		return fmt.Errorf("make namespaces: %w", err)
	}
	if b.flags&unix.CLONE_NEWTIME != 0 {
		if err := setClocks(l.TimeOffsets); err != nil {
			return err
		}
	}
	for _, ns := range []struct {
		name string
		flag int
	}{{"net", unix.CLONE_NEWNET}, {"ipc", unix.CLONE_NEWIPC}, {"uts", unix.CLONE_NEWUTS}, {"mnt", unix.CLONE_NEWNS}} {
		if flags&ns.flag == 0 {
			continue
		}
		f, err := h.Namespace(ns.name)
		if err != nil {
			return err
		}
		if ns.name == "mnt" { // in the new one, what is mounted on the host can't be taken apart
			if err := r.collect(); err != nil {
				f.Close()
				return err
			}
		}
		err = unix.Setns(int(f.Fd()), ns.flag)
		if ns.name == "net" {
			b.netns = f
		} else {
			f.Close()
		}
		if err != nil {
			return fmt.Errorf("join %s namespace: %w", ns.name, err)
		}
	}
	// What we make from now on, mount points and devices, is the container's root's.
	return userns.FilesAs(uint32(u.uid(0)), uint32(u.gid(0)))
}

// enter adds the steps into the user namespace to a child's program; see the type. proc is the host's, for what only its root may set.
func (u *userNamespace) enter(prog *nsfork.Program, p *specs.Process, proc *os.File, newPID bool) error {
	for _, l := range p.Rlimits {
		n, ok := rlimitNumbers[strings.ToUpper(l.Type)]
		if !ok {
			return fmt.Errorf("limit %s: unknown", l.Type)
		}
		var own unix.Rlimit
		if err := unix.Getrlimit(n, &own); err != nil {
			return err
		}
		if l.Hard > own.Max {
			own.Max = l.Hard
			prog.Call("raise limit "+l.Type, unix.SYS_PRLIMIT64, 0, n, rlimitPointer(own), 0)
		}
	}
	if p.OOMScoreAdj != nil {
		setOOMScore(prog, proc, "self/oom_score_adj", *p.OOMScoreAdj)
	}
	prog.Call("enter user namespace", unix.SYS_SETNS, u.file, unix.CLONE_NEWUSER)
	if newPID {
		prog.Fork(unix.CLONE_NEWPID)
	}
	prog.Call("set groups", unix.SYS_SETGROUPS, 0, 0)
	prog.Call("become the container's root", unix.SYS_SETRESGID, 0, 0, 0)
	prog.Call("become the container's root", unix.SYS_SETRESUID, 0, 0, 0)
	prog.Init() // never as the host's root
	return nil
}
