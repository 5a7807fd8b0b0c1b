package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"conex/internal/linux/mount"
	"conex/internal/linux/userns"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// What an OCI spec has no words for, parts of volumes, images as mounts and other ids, is mounted by ourselves and given to the runtime
// as the source of a plain bind. It is mounted where `create` is executed, in a mount namespace that ends with it; the container has a copy
// of what it was bound from. So there is nothing to take away, however anybody ends.

// place is where mounts for a runtime are made.
type place struct {
	dir string // a tmpfs
	n   int
}

// ownMounts gives the calling thread, which ends with it, a mount namespace of its own.
func ownMounts() error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("make mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	return nil
}

// showAside makes a folder where the root file system was at create: runc wants to work there, and says nothing of it but that a file
// does not exist. The calling thread ends in a mount namespace of its own.
func (f *foreign) showAside() error {
	if f.aside == "" {
		return nil
	}
	if err := ownMounts(); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", filepath.Dir(f.aside), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mount tmpfs for the runtime: %w", err)
	}
	return os.Mkdir(f.aside, 0o755)
}

// newPlace covers a folder of the calling thread's mount namespace with a tmpfs. The bundle would do, but the container's root, who is nobody
// outside, can't get there through folders that are the host root's alone: with a user namespace it is one of the top.
func (f *foreign) newPlace(users *userNamespace) (*place, error) {
	dir := filepath.Join(f.dir, "mounts")
	if users != nil {
		var err error
		if dir, err = f.coverable(); err != nil {
			return nil, err
		}
	} else if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return nil, fmt.Errorf("mount tmpfs for the runtime: %w", err)
	}
	return &place{dir: dir}, nil
}

// coverable is a folder whose content neither the runtime nor the making of the container needs.
func (f *foreign) coverable() (string, error) {
	for _, dir := range []string{"/mnt", "/media", "/srv", "/opt", "/home"} {
		st, err := os.Lstat(dir)
		if err != nil || !st.IsDir() || st.Mode().Perm()&0o001 == 0 {
			continue
		}
		needed := []string{f.rt.Path, f.dir, f.rt.State, f.cfg.Scratch, f.cfg.RootFS.Upper, f.cfg.RootFS.Dir}
		needed = append(needed, f.cfg.RootFS.Lower...)
		for _, m := range f.cfg.Spec.Mounts {
			needed = append(needed, m.Source)
		}
		for _, s := range f.cfg.Sources {
			needed = append(needed, s.Lower...)
		}
		if !slices.ContainsFunc(needed, func(p string) bool { return p != "" && below(p, dir) }) {
			return dir, nil
		}
	}
	return "", errors.New("a user namespace on this runtime needs one of the folders /mnt, /media, /srv, /opt and /home, without data of conex's in it")
}

// add attaches a detached mount and returns its path.
func (p *place) add(tree *os.File) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(tree.Fd()), &st); err != nil {
		return "", err
	}
	path := filepath.Join(p.dir, strconv.Itoa(p.n))
	p.n++
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		if err := os.Mkdir(path, 0o755); err != nil {
			return "", err
		}
	} else if err := os.WriteFile(path, nil, 0o644); err != nil {
		return "", err
	}
	at, err := os.OpenFile(path, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", err
	}
	defer at.Close()
	return path, mount.Attach(tree, at)
}

// root mounts the container's root file system and returns its path.
func (f *foreign) root(r *rootfs, p *place) (string, error) {
	if r.users == nil {
		return f.cfg.Scratch, r.mountRoot()
	}
	// Overlayfs makes its work folder as who mounts it, and the host's root has no id in a mapped upper layer.
	err := userns.FilesAs(uint32(r.users.uid(0)), uint32(r.users.gid(0)))
	if err == nil {
		err = r.mountRoot()
	}
	if err = errors.Join(err, userns.FilesAs(0, 0)); err != nil {
		return "", err
	}
	tree, err := mount.Clone(int(r.root.Fd()), "", true)
	if err != nil {
		return "", err
	}
	defer tree.Close()
	f.aside, err = p.add(tree)
	return f.aside, err
}

// prepare makes the mounts of s which the runtime could not, and puts binds in their place.
func (f *foreign) prepare(r *rootfs, p **place, s *specs.Spec) error {
	for i := range s.Mounts {
		m := &s.Mounts[i]
		o := parseMountOptions(m.Options)
		src := f.cfg.Sources[m.Destination]
		special := src.Subpath != "" || src.Lower != nil || src.Overlay != nil || src.Owner != nil || o.idmap || len(m.UIDMappings)+len(m.GIDMappings) > 0
		if !o.bind && m.Type != "bind" || !special && r.users == nil {
			continue
		}
		if *p == nil {
			var err error
			if *p, err = f.newPlace(r.users); err != nil {
				return err
			}
		}
		o.bind = true
		tree, err := r.source(i, *m, o)
		if err == nil {
			m.Source, err = (*p).add(tree)
			tree.Close()
		}
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.Destination, err)
		}
		m.Type, m.UIDMappings, m.GIDMappings = "bind", nil, nil
		m.Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "idmap" || o == "ridmap" })
		if !slices.Contains(m.Options, "bind") && !slices.Contains(m.Options, "rbind") {
			m.Options = append(m.Options, "rbind")
		}
	}
	return nil
}

// nodes puts a bind of a node of ours in the place of each device of s. In a user namespace nobody can make one: there runtimes bind what the host
// has at the path that the device is to have in the container. The calling thread's umask is its own.
func (f *foreign) nodes(r *rootfs, p *place, s *specs.Spec) error {
	if r.users == nil || len(s.Linux.Devices) == 0 {
		return nil
	}
	path := filepath.Join(p.dir, "nodes")
	if err := os.Mkdir(path, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", path, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755"); err != nil {
		return fmt.Errorf("mount tmpfs for devices: %w", err)
	}
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	defer unix.Umask(unix.Umask(0))
	root := uint32(0)
	for i, d := range s.Linux.Devices {
		m := specs.Mount{Destination: d.Path, Type: "bind", Source: filepath.Join(path, strconv.Itoa(i)), Options: []string{"bind", "nosuid", "noexec"}}
		d.Path = "/dev/" + strconv.Itoa(i) // dir is that to makeNode
		if d.UID == nil {
			d.UID = &root
		}
		if d.GID == nil {
			d.GID = &root
		}
		if err := r.makeNode(dir, d); err != nil {
			return err
		}
		s.Mounts = append(s.Mounts, m)
	}
	s.Linux.Devices = nil
	return nil
}

// ownUsers is the user namespace that the runtime is going to make, as far as mounts have to know it; nil without one.
func ownUsers(s *specs.Spec) (*userNamespace, error) {
	if !hasNamespace(s, specs.UserNamespace) {
		return nil, nil
	}
	u := &userNamespace{uidMap: idMap(s.Linux.UIDMappings), gidMap: idMap(s.Linux.GIDMappings)}
	var err error
	u.file, err = userns.Mapping(u.uidMap, u.gidMap)
	return u, err
}

// pingGroups is the sysctl of a range of groups, by default of all that there are.
const pingGroups = "net.ipv4.ping_group_range"

// groups returns a value of pingGroups as far as the namespace has those groups, by their numbers inside or, for whoever writes it there, outside.
func (u *userNamespace) groups(v string, outside bool) string {
	f := strings.Fields(v)
	if u == nil || len(f) != 2 {
		return v
	}
	for i := range f {
		n, err := strconv.ParseUint(f[i], 10, 32)
		if err != nil {
			return v
		}
		n = min(n, end(u.gidMap)-1)
		if outside {
			n = uint64(max(u.gid(uint32(n)), 0))
		}
		f[i] = strconv.FormatUint(n, 10)
	}
	return strings.Join(f, " ")
}
