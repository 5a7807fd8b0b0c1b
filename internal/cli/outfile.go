package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// output gives fn standard output or, with a path, a new file that takes the place of what is at path only when fn has succeeded. A
// device or pipe is written to directly. Killed half-way it leaves nothing.
func (a *app) output(path string, fn func(io.Writer) error) error { return a.outputAs(path, 0o600, fn) }

// outputAs is output for a file of a mode, less the umask.
func (a *app) outputAs(path string, mode os.FileMode, fn func(io.Writer) error) error {
	if path == "" {
		return fn(a.out)
	}
	st, err := os.Stat(path)
	switch {
	case err == nil && st.IsDir():
		return fmt.Errorf("write %s: it is a folder", path)
	case err == nil && !st.Mode().IsRegular():
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		err = fn(f)
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		return err
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real // the file is replaced, not the link to it
	}
	dir := filepath.Dir(path)
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	// A file without a name: the kernel drops it with this process.
	f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_WRONLY, mode)
	named := err != nil
	if named { // not every file system has them
		if f, err = os.CreateTemp(dir, ".tmp-"+filepath.Base(path)+".*"); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
	}
	defer f.Close() // it counts below
	tmp := ""
	if named {
		tmp = f.Name()
	}
	if err = fn(f); err == nil && !named {
		tmp = filepath.Join(dir, fmt.Sprintf(".tmp-%s.%d", filepath.Base(path), os.Getpid()))
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, tmp, unix.AT_SYMLINK_FOLLOW)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil && tmp != "" {
		os.Remove(tmp)
	}
	return err
}
