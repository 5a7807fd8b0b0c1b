// Package userns makes user namespaces, and other namespaces that belong to one.
//
// A Go program can't enter a user namespace: the kernel wants a process of one thread for that (setns(2), unshare(2)). A forked child
// of a few system calls can. It makes the namespaces, its parent writes the id maps and takes a descriptor of each namespace, and
// then the child is no longer needed: whoever has the descriptors has the namespaces.
package userns

import (
	"fmt"
	"os"
	"strings"

	"conex/internal/linux/nsfork"

	"golang.org/x/sys/unix"
)

// Range maps Size ids from Inside, as the namespace sees them, to those from Outside.
type Range struct{ Inside, Outside, Size uint32 }

// Map is a mapping of ids. Ids that no range has are not mapped: they show as 65534, and can't be taken.
type Map []Range

// Outside returns what the namespace's id is outside of it.
func (m Map) Outside(id uint32) (uint32, bool) {
	for _, r := range m {
		if id >= r.Inside && id-r.Inside < r.Size {
			return r.Outside + (id - r.Inside), true
		}
	}
	return 0, false
}

// String is the map in the words of /proc/<pid>/uid_map.
func (m Map) String() string {
	var b strings.Builder
	for _, r := range m {
		fmt.Fprintf(&b, "%d %d %d\n", r.Inside, r.Outside, r.Size)
	}
	return b.String()
}

// Holder is a process that keeps namespaces until they have been opened.
type Holder struct {
	pid   int
	pidfd *os.File
	wake  *os.File // its end, should we die, ends the process
}

// New makes a user namespace with these maps and, belonging to it, the namespaces that flags (CLONE_NEW*) ask for. The caller
// needs CAP_SETUID and CAP_SETGID over the ids.
func New(flags uint64, uids, gids Map) (*Holder, error) {
	h, err := hold(nil, flags|unix.CLONE_NEWUSER, 0)
	if err != nil {
		return nil, fmt.Errorf("make user namespace: %w", err)
	}
	for _, m := range []struct {
		file string
		ids  Map
	}{{"uid_map", uids}, {"gid_map", gids}} {
		// One write, as the kernel wants it.
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/%s", h.pid, m.file), []byte(m.ids.String()), 0); err != nil {
			h.Close()
			return nil, fmt.Errorf("make user namespace: map %s to %s: %w", m.file[:3], strings.TrimSpace(m.ids.String()), err)
		}
	}
	return h, nil
}

// Join makes namespaces that belong to an existing user namespace.
func Join(user *os.File, flags uint64) (*Holder, error) {
	h, err := hold(user, 0, flags)
	if err != nil {
		return nil, fmt.Errorf("join user namespace %s: %w", user.Name(), err)
	}
	return h, nil
}

// Mapping makes a user namespace for its maps alone, as idmapped mounts want one.
func Mapping(uids, gids Map) (*os.File, error) {
	h, err := New(0, uids, gids)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	return h.Namespace("user")
}

func hold(user *os.File, clone, unshare uint64) (*Holder, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	var p nsfork.Program
	if user != nil {
		p.Call("enter", unix.SYS_SETNS, user, unix.CLONE_NEWUSER)
		p.Call("make namespaces", unix.SYS_UNSHARE, unshare)
	}
	// The other end is open in the child too.
	p.Call("wait", unix.SYS_CLOSE, w)
	p.Ready()
	p.Call("wait", unix.SYS_READ, r, make([]byte, 8), 1)
	p.Exit(0)
	pid, pidfd, err := p.Start(nsfork.Attr{Flags: clone})
	if err != nil {
		w.Close()
		return nil, err
	}
	return &Holder{pid, pidfd, w}, nil
}

// Namespace opens one of the namespaces, by its name in /proc/<pid>/ns.
func (h *Holder) Namespace(name string) (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", h.pid, name))
	if err != nil {
		return nil, fmt.Errorf("open %s namespace: %w", name, err)
	}
	return f, nil
}

// Close ends the process. Namespaces that were opened stay.
func (h *Holder) Close() {
	// Killed: another holder, which was forked while this one lived, may have the pipe's other end too. ESRCH is no harm.
	_ = unix.Kill(h.pid, unix.SIGKILL)
	h.wake.Close()
	h.pidfd.Close()
	for {
		if _, err := unix.Wait4(h.pid, nil, 0, nil); err != unix.EINTR {
			return
		}
	}
}

// FilesAs makes the calling thread, locked to its goroutine, handle files as this user and group, with the capabilities that it has:
// what it makes belongs to them.
func FilesAs(uid, gid uint32) error {
	if err := unix.Setfsgid(int(gid)); err != nil {
		return fmt.Errorf("make files as group %d: %w", gid, err)
	}
	if err := unix.Setfsuid(int(uid)); err != nil {
		return fmt.Errorf("make files as user %d: %w", uid, err)
	}
	// Which took the effective capabilities that concern files away (capabilities(7)).
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("make files as user %d: %w", uid, err)
	}
	for i := range data {
		data[i].Effective = data[i].Permitted
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("make files as user %d: %w", uid, err)
	}
	return nil
}

// Maps returns the maps of the user namespace, as the caller's sees it.
func (h *Holder) Maps() (uids, gids Map, err error) { return MapsOf(h.pid) }

// MapsOf returns the maps of a process's user namespace, as the caller's sees it.
func MapsOf(pid int) (uids, gids Map, err error) {
	read := func(name string) (m Map) {
		b, rerr := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if rerr != nil {
			err = rerr
			return nil
		}
		for line := range strings.Lines(string(b)) {
			var r Range
			if _, serr := fmt.Sscan(line, &r.Inside, &r.Outside, &r.Size); serr != nil {
				err = fmt.Errorf("read id map %q: %w", line, serr)
				return nil
			}
			m = append(m, r)
		}
		return m
	}
	uids, gids = read("uid_map"), read("gid_map")
	return uids, gids, err
}
