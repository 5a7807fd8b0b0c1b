// Package mount wraps the kernel's new mount API: file systems and trees as file descriptors, attached where wanted.
//
// Kernel 5.12 (mount_setattr) is the least it works with. A detached mount lives as long as its descriptor, so a crash
// leaks nothing; see fsopen(2), open_tree(2), move_mount(2), mount_setattr(2).
package mount

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Param is one option given to fsconfig(2). A Param without Value is a flag.
type Param struct {
	Key, Value string
	// Flag says that the option takes no value ("ro").
	Flag bool
}

// New makes a detached mount of fstype. attr are MOUNT_ATTR_* bits.
func New(fstype string, params []Param, attr int) (*os.File, error) {
	fd, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open file system type %s: %w", fstype, err)
	}
	defer unix.Close(fd)
	for _, p := range params {
		if p.Flag {
			err = unix.FsconfigSetFlag(fd, p.Key)
		} else {
			err = unix.FsconfigSetString(fd, p.Key, p.Value)
		}
		if err != nil {
			return nil, fsError(fd, fmt.Errorf("mount %s: option %s=%s: %w", fstype, p.Key, p.Value, err))
		}
	}
	return create(fd, fstype, attr)
}

func create(fd int, fstype string, attr int) (*os.File, error) {
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, fsError(fd, fmt.Errorf("mount %s: %w", fstype, err))
	}
	mfd, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return nil, fsError(fd, fmt.Errorf("mount %s: %w", fstype, err))
	}
	return os.NewFile(uintptr(mfd), fstype), nil
}

// fsError adds what the kernel wrote into the file system context's message log, which says far more than an errno.
func fsError(fd int, err error) error {
	var buf [512]byte
	for {
		n, rerr := unix.Read(fd, buf[:])
		if rerr != nil || n <= 2 {
			return err
		}
		if buf[0] == 'e' { // "e message": an error; 'w' and 'i' are warnings and notes
			err = fmt.Errorf("%w (%s)", err, strings.TrimSpace(string(buf[2:n])))
		}
	}
}

// Clone makes a detached copy of the mount at path (as seen from dir; unix.AT_FDCWD for the working folder).
// An empty path means dir itself. recursive takes the mounts below along.
func Clone(dir int, path string, recursive bool) (*os.File, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	if path == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	fd, err := unix.OpenTree(dir, path, flags)
	if err != nil {
		return nil, &fs.PathError{Op: "clone mount", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// SetAttr sets and clears MOUNT_ATTR_* bits, and the propagation (unix.MS_PRIVATE, ... or 0), of the mount behind f.
func SetAttr(f *os.File, set, clr uint64, propagation uint64, recursive bool) error {
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	err := unix.MountSetattr(int(f.Fd()), "", flags, &unix.MountAttr{Attr_set: set, Attr_clr: clr, Propagation: propagation})
	if err != nil {
		return fmt.Errorf("set mount attributes of %s: %w", f.Name(), err)
	}
	return nil
}

// Attach moves the mount m onto target, an O_PATH handle, so that no path is resolved a second time.
func Attach(m, target *os.File) error {
	err := unix.MoveMount(int(m.Fd()), "", int(target.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("attach mount %s on %s: %w", m.Name(), target.Name(), err)
	}
	return nil
}

// IsRoot reports whether a mount is attached at path; false for a path that is not there.
func IsRoot(path string) (bool, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, &st)
	if err == unix.ENOENT {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "look for mount", Path: path, Err: err}
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// OverlayOptions describe an overlay mount.
type OverlayOptions struct {
	// Lower are the read-only folders, top first. One is enough.
	Lower []string
	// Upper and Work are the writable folder and overlayfs's own, on one file system. Both empty: a read-only overlay.
	Upper, Work string
	// ReadOnly mounts read-only although there is an Upper.
	ReadOnly bool
	// Volatile skips every sync of the upper file system, at the end too: for upper folders that nobody mounts again.
	Volatile bool
	// Users is a user namespace: what belongs to an id on disk is shown as belonging to what that id is outside of it, see IDMap. nil:
	// all as it is. The caller is in a mount namespace of its own where the kernel is older than 6.15.
	Users *os.File
	// UpperAsIs leaves Upper out of that: its files have the ids that are shown. A tmpfs can't be mapped before Linux 6.3.
	UpperAsIs bool
}

// Overlay makes a detached overlay mount, usable as a root for openat2(2), gone when closed unless attached.
func Overlay(o OverlayOptions) (*os.File, error) {
	lower := o.Lower
	if o.Upper == "" && len(lower) == 1 {
		// Without an upper layer overlayfs wants two lower ones: a plain read-only view of the one serves.
		m, err := Clone(unix.AT_FDCWD, lower[0], true)
		if err != nil {
			return nil, err
		}
		err = SetAttr(m, unix.MOUNT_ATTR_RDONLY, 0, unix.MS_PRIVATE, true)
		if err == nil && o.Users != nil {
			err = IDMap(m, o.Users, true)
		}
		if err != nil {
			m.Close()
			return nil, err
		}
		return m, nil
	}
	if len(lower) == 0 {
		return nil, errors.New("mount overlay: no lower folder")
	}
	attr := 0
	if o.ReadOnly || o.Upper == "" {
		attr = unix.MOUNT_ATTR_RDONLY
	}
	if o.Users != nil {
		return overlayMapped(o, attr)
	}
	if classicOnly.Load() {
		return overlayClassic(o, attr)
	}
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open file system type overlay: %w", err)
	}
	defer unix.Close(fd)
	for _, l := range lower {
		err := unix.FsconfigSetString(fd, "lowerdir+", l)
		if err == unix.EINVAL {
			return overlayClassic(o, attr) // before 6.8, or a path of more than 255 bytes
		}
		if err != nil {
			return nil, fsError(fd, fmt.Errorf("mount overlay: layer %s: %w", l, err))
		}
	}
	params := []Param{{Key: "source", Value: "overlay"}}
	if o.Upper != "" {
		// An upper folder is turned into a layer by reading it alone: a rename or a change of mode must not be recorded as a
		// pointer into a lower layer, whatever the kernel's defaults are.
		params = append(params, Param{Key: "redirect_dir", Value: "off"}, Param{Key: "metacopy", Value: "off"},
			Param{Key: "upperdir", Value: o.Upper}, Param{Key: "workdir", Value: o.Work})
		if o.Volatile {
			params = append(params, Param{Key: "volatile", Flag: true})
		}
	}
	for _, p := range params {
		if p.Flag {
			err = unix.FsconfigSetFlag(fd, p.Key)
		} else {
			err = unix.FsconfigSetString(fd, p.Key, p.Value)
		}
		if err == unix.EINVAL && len(p.Value) > 255 {
			return overlayClassic(o, attr) // fsconfig takes strings of at most 255 bytes
		}
		if err != nil {
			return nil, fsError(fd, fmt.Errorf("mount overlay: option %s=%s: %w", p.Key, p.Value, err))
		}
	}
	m, err := create(fd, "overlay", attr)
	if errors.Is(err, unix.EINVAL) {
		// Kernels up to 6.6 take every option as it comes and refuse the unknown "lowerdir+" only here.
		if m, cerr := overlayClassic(o, attr); cerr == nil {
			classicOnly.Store(true)
			return m, nil
		}
	}
	return m, err
}

// classicOnly remembers that this kernel doesn't know "lowerdir+".
var classicOnly atomic.Bool

// overlayClassic mounts by the option string of mount(2), one page long, on a folder of its own, and takes the mount from
// there. The calling thread's mount namespace sees the mount for a moment.
func overlayClassic(o OverlayOptions, attr int) (*os.File, error) {
	esc := strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`)
	dirs := make([]string, len(o.Lower))
	for i, l := range o.Lower {
		dirs[i] = esc.Replace(l)
	}
	opts := "lowerdir=" + strings.Join(dirs, ":")
	if o.Upper != "" {
		opts += ",redirect_dir=off,metacopy=off,upperdir=" + esc.Replace(o.Upper) + ",workdir=" + esc.Replace(o.Work)
		if o.Volatile {
			opts += ",volatile"
		}
	}
	if len(opts) >= os.Getpagesize() {
		return nil, fmt.Errorf("mount overlay: %d layers need %d bytes of options and this kernel takes %d: use a newer kernel (6.8) or fewer layers", len(o.Lower), len(opts), os.Getpagesize()-1)
	}
	at, err := os.MkdirTemp("", "conex-overlay-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(at)
	if err := unix.Mount("overlay", at, "overlay", 0, opts); err != nil {
		return nil, fmt.Errorf("mount overlay: %w", err)
	}
	m, err := Clone(unix.AT_FDCWD, at, false)
	if uerr := unix.Unmount(at, unix.MNT_DETACH); err == nil && uerr != nil {
		m.Close()
		return nil, fmt.Errorf("unmount %s: %w", at, uerr)
	}
	if err != nil {
		return nil, err
	}
	if err := SetAttr(m, uint64(attr), 0, unix.MS_PRIVATE, false); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// MountAttr is struct mount_attr for callers that pass it to a raw system call.
type MountAttr = unix.MountAttr

// MountAttrSize is the size of MountAttr in bytes, which mount_setattr(2) asks for.
const MountAttrSize = unsafe.Sizeof(unix.MountAttr{})
