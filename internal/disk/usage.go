package disk

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Space is what files take.
type Space struct {
	// Disk counts the blocks that are allocated, in bytes, as du does.
	Disk int64
	// Size is the sum of the lengths of regular files.
	Size int64
	// Files counts everything that is no folder.
	Files int64
}

// Plus returns the sum.
func (s Space) Plus(o Space) Space { return Space{s.Disk + o.Disk, s.Size + o.Size, s.Files + o.Files} }

// Meter adds up what files and trees take. A file with several names counts once in all sums of one Meter: in the first that meets
// it. It may be used by several goroutines; the zero value is ready.
type Meter struct {
	once  sync.Once
	slots chan struct{}
	mu    sync.Mutex
	seen  map[[2]uint64]struct{}
}

// sum is a Space that goroutines add to.
type sum struct{ disk, size, files atomic.Int64 }

// longest is how long a path grows before it begins anew at an open folder: the kernel takes 4096 bytes.
const longest = 3000

// Tree adds up path and what lies below it. What vanishes meanwhile counts nothing, so a path that does not exist is no error.
func (m *Meter) Tree(path string) (Space, error) {
	m.once.Do(func() {
		m.slots = make(chan struct{}, 2*runtime.GOMAXPROCS(0)) // half of them wait for the disk
		m.seen = map[[2]uint64]struct{}{}
	})
	var s sum
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	if err == nil {
		m.count(&s, &st)
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			var wg sync.WaitGroup
			var first firstError
			m.folder(&s, &wg, &first, nil, path)
			wg.Wait()
			err = first.err
		}
	}
	if err != nil && err != unix.ENOENT {
		return Space{}, fmt.Errorf("measure %s: %w", path, err)
	}
	return Space{s.disk.Load(), s.size.Load(), s.files.Load()}, nil
}

// One returns what the file or folder at path itself takes, without what lies in it.
func (m *Meter) One(path string) (Space, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err == unix.ENOENT {
		return Space{}, nil
	} else if err != nil {
		return Space{}, fmt.Errorf("measure %s: %w", path, err)
	}
	m.once.Do(func() {
		m.slots = make(chan struct{}, 2*runtime.GOMAXPROCS(0))
		m.seen = map[[2]uint64]struct{}{}
	})
	var s sum
	m.count(&s, &st)
	return Space{s.disk.Load(), s.size.Load(), s.files.Load()}, nil
}

type firstError struct {
	once sync.Once
	err  error
}

func (f *firstError) set(err error) {
	if err != nil && err != unix.ENOENT && err != unix.ENOTDIR {
		f.once.Do(func() { f.err = err })
	}
}

// folder adds up what lies in the folder rel, which is relative to base unless that is nil.
func (m *Meter) folder(s *sum, wg *sync.WaitGroup, first *firstError, base *os.File, rel string) {
	at := unix.AT_FDCWD
	if base != nil {
		at = int(base.Fd())
	}
	fd, err := unix.Openat(at, rel, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	runtime.KeepAlive(base)
	if err != nil {
		first.set(err)
		return
	}
	dir := os.NewFile(uintptr(fd), rel)
	names, err := dir.Readdirnames(-1)
	first.set(cause(err))
	var subs []string
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			first.set(err)
			continue
		}
		m.count(s, &st)
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			subs = append(subs, name)
		}
	}
	if len(rel) > longest {
		base, rel = dir, "." // closed by its finalizer, when the last folder below is done
	} else {
		dir.Close()
	}
	for _, name := range subs {
		sub := filepath.Join(rel, name)
		select {
		case m.slots <- struct{}{}:
			wg.Go(func() {
				defer func() { <-m.slots }()
				m.folder(s, wg, first, base, sub)
			})
		default:
			m.folder(s, wg, first, base, sub)
		}
	}
}

func (m *Meter) count(s *sum, st *unix.Stat_t) {
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if !isDir && st.Nlink > 1 {
		m.mu.Lock()
		key := [2]uint64{st.Dev, st.Ino}
		_, known := m.seen[key]
		m.seen[key] = struct{}{}
		m.mu.Unlock()
		if known {
			return
		}
	}
	s.disk.Add(st.Blocks * 512)
	if !isDir {
		s.files.Add(1)
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			s.size.Add(st.Size)
		}
	}
}

// cause unwraps the error of an os call to the kernel's.
func cause(err error) error {
	if pe, ok := err.(*os.PathError); ok {
		return pe.Err
	}
	if se, ok := err.(*os.SyscallError); ok {
		return se.Err
	}
	return err
}

// Free says how large the file system of path is and how much of it is free for writers without privileges of their own, in bytes.
func Free(path string) (free, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, 0, fmt.Errorf("free space of %s: %w", path, err)
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

// FreeFiles returns how many files the file system that holds path can have besides those it has; counted is false where nothing bounds them.
func FreeFiles(path string) (free uint64, counted bool) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, false
	}
	return st.Ffree, st.Files > 0
}
