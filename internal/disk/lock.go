package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Lock is a flock(2) on a permanent file. It dies with its process.
//
// Order, outermost first: gc.lock, volumes, a container's lock, names, layers, images, networks. Readers take none.
type Lock struct {
	f      *os.File
	handed bool // another process goes on holding it
}

// ErrLocked says that another process holds a lock that TryAcquire wanted.
var ErrLocked = errors.New("locked by another process")

// Acquire takes an exclusive lock on path, waiting for it, and creates the file if needed.
func Acquire(path string) (*Lock, error) { return flock(context.Background(), path, unix.LOCK_EX) }

// AcquireShared takes a shared lock on path, waiting for it.
func AcquireShared(path string) (*Lock, error) {
	return flock(context.Background(), path, unix.LOCK_SH)
}

// TryAcquire takes an exclusive lock on path or returns ErrLocked at once.
func TryAcquire(path string) (*Lock, error) {
	return flock(context.Background(), path, unix.LOCK_EX|unix.LOCK_NB)
}

// TryAcquireShared takes a shared lock on path or returns ErrLocked at once.
func TryAcquireShared(path string) (*Lock, error) {
	return flock(context.Background(), path, unix.LOCK_SH|unix.LOCK_NB)
}

// AcquireContext is Acquire that gives up when ctx ends.
func AcquireContext(ctx context.Context, path string) (*Lock, error) {
	return wait(ctx, path, unix.LOCK_EX)
}

// AcquireSharedContext is AcquireShared that gives up when ctx ends.
func AcquireSharedContext(ctx context.Context, path string) (*Lock, error) {
	return wait(ctx, path, unix.LOCK_SH)
}

// AcquireReader is AcquireShared for who only reads what path guards, on a file system that is mounted read-only too: where the file can't be
// made, its folder is locked.
func AcquireReader(path string) (*Lock, error) {
	ctx := context.Background()
	l, err := flock(ctx, path, unix.LOCK_SH)
	if errors.Is(err, unix.EROFS) {
		if l, err = flockAs(ctx, path, unix.O_RDONLY, unix.LOCK_SH); errors.Is(err, fs.ErrNotExist) {
			l, err = flockAs(ctx, filepath.Dir(path), unix.O_RDONLY|unix.O_DIRECTORY, unix.LOCK_SH)
		}
	}
	return l, err
}

func wait(ctx context.Context, path string, how int) (*Lock, error) {
	l, err := flock(context.Background(), path, how|unix.LOCK_NB)
	if !errors.Is(err, ErrLocked) {
		return l, err
	}
	type result struct {
		l   *Lock
		err error
	}
	ch := make(chan result, 1)
	go func() { // ends when the lock is free, at the latest with the process
		l, err := flock(ctx, path, how)
		ch <- result{l, err}
	}()
	select {
	case r := <-ch:
		return r.l, r.err
	case <-ctx.Done():
		go func() {
			if r := <-ch; r.l != nil {
				r.l.Release()
			}
		}()
		return nil, ctx.Err()
	}
}

// flock opens and locks. The end of ctx does not wake it up, but it makes no file any more then: whoever gave up may be
// removing the folder.
func flock(ctx context.Context, path string, how int) (*Lock, error) {
	return flockAs(ctx, path, unix.O_RDWR|unix.O_CREAT, how)
}

func flockAs(ctx context.Context, path string, flags, how int) (*Lock, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lock: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	if err := retry(func() error { return unix.Flock(fd, how) }); err != nil {
		unix.Close(fd)
		if err == unix.EWOULDBLOCK {
			return nil, fmt.Errorf("lock %s: %w", path, ErrLocked)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	// Sweep or RemoveLocked may have taken the file away between our open and our lock: then this lock guards nothing.
	var mine, here unix.Stat_t
	if unix.Fstat(fd, &mine) == nil && (unix.Stat(path, &here) != nil || here.Ino != mine.Ino || here.Dev != mine.Dev) {
		unix.Close(fd)
		return flockAs(ctx, path, flags, how)
	}
	return &Lock{f: os.NewFile(uintptr(fd), path)}, nil
}

// Release gives the lock back, unless another process goes on holding it. Safe on nil and when called twice.
func (l *Lock) Release() {
	if l == nil || l.f == nil {
		return
	}
	if !l.handed {
		unlock(int(l.f.Fd()))
	}
	l.f.Close()
	l.f = nil
}

// unlock comes before every close of a locked file: a child that is being forked has a copy of it until it executes, and whoever tries
// the lock meanwhile would be refused what is free.
func unlock(fd int) error { return retry(func() error { return unix.Flock(fd, unix.LOCK_UN) }) }

// Pause lets go of the lock but not of its file, for Resume.
func (l *Lock) Pause() error {
	return unlock(int(l.f.Fd()))
}

// Resume takes a paused lock again, waiting for it. fs.ErrNotExist says that its file is no longer at its path, or another one is: what the
// lock was for is gone.
func (l *Lock) Resume() error {
	fd := int(l.f.Fd())
	if err := retry(func() error { return unix.Flock(fd, unix.LOCK_EX) }); err != nil {
		return fmt.Errorf("lock %s: %w", l.f.Name(), err)
	}
	var held, now unix.Stat_t
	err := unix.Fstat(fd, &held)
	if err == nil {
		err = unix.Stat(l.f.Name(), &now)
	}
	if err == nil && (now.Dev != held.Dev || now.Ino != held.Ino) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", l.f.Name(), err)
	}
	return nil
}

// RemoveLocked removes a folder with the lock in it that guards it, which the caller holds. For everybody else the folder goes at once: whoever
// wants the lock from then on makes a new one, and whoever waits for this one gets that. Removed file by file it could get new ones, and a lock
// with another owner, until it is empty. No folder is no error.
//
// A remover that is killed leaves a folder that IsTemp knows by its name, for RemoveLeft.
func RemoveLocked(dir string) error {
	gone := filepath.Join(filepath.Dir(dir), tempPrefix+strconv.FormatUint(rand.Uint64(), 36))
	if err := unix.Rename(dir, gone); err != nil {
		if err == unix.ENOENT {
			return nil
		}
		return fmt.Errorf("delete %s: %w", dir, &os.LinkError{Op: "rename", Old: dir, New: gone, Err: err})
	}
	if removeFlat(gone) == nil {
		return nil
	}
	return os.RemoveAll(gone)
}

// removeFlat removes a folder in which are files alone, in half the calls that it takes not to know that.
func removeFlat(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var buf [2048]byte
	n, err := unix.ReadDirent(fd, buf[:])
	if err != nil {
		return err
	}
	_, _, names := unix.ParseDirent(buf[:n], -1, nil)
	for _, name := range names {
		if err := unix.Unlinkat(fd, name, 0); err != nil {
			return err
		}
	}
	return unix.Rmdir(dir)
}

// RemoveLeft removes what killed callers of RemoveLocked have left, from a listing of the folder where that was.
func RemoveLeft(dir string, entries []fs.DirEntry) error {
	var errs []error
	for _, e := range entries {
		if e.IsDir() && IsTemp(e.Name()) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// File returns the locked file.
func (l *Lock) File() *os.File { return l.f }

// Hand returns the locked file for another process, which makes a Lock of it by Handed (flock follows the open file description). From now on
// it is the other's: Release here gives nothing back.
func (l *Lock) Hand() *os.File {
	l.handed = true
	return l.f
}

// Handed is the lock that another process has handed to this one by f.
func Handed(f *os.File) *Lock { return &Lock{f: f} }

// Held reports whether somebody holds path exclusively. Unlike TryAcquire it makes no file; one that does not exist is not held.
func Held(path string) bool {
	var fd int
	err := retry(func() (err error) { fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0); return err })
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	if err := retry(func() error { return unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB) }); err != nil {
		return err == unix.EWOULDBLOCK
	}
	unlock(fd)
	return false
}
