package build

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"sync"

	"github.com/moby/patternmatcher"
	"golang.org/x/sys/unix"
)

// walker finds what a selection means. One goroutine uses it: the matchers compile their patterns as they go.
type walker struct {
	ctx     context.Context //nolint:containedctx // a walker lives within one call
	v       *view
	ignore  *ignoreMatcher
	exclude *patternmatcher.PatternMatcher
	dirents []byte
	// helpers are the walkers that have nothing to do; a folder goes to one of them if there is one.
	helpers chan *walker
}

// newWalker makes a walker, with as many helpers as there are further processors.
func newWalker(ctx context.Context, v *view, opt selectOptions) (*walker, error) {
	n := runtime.GOMAXPROCS(0) - 1
	helpers := make(chan *walker, n)
	one := func() (w *walker, err error) {
		w = &walker{ctx: ctx, v: v, helpers: helpers}
		if len(v.ignore) > 0 {
			if w.ignore, err = newIgnoreMatcher(v.ignore); err != nil {
				return nil, err // whoever read the patterns knows their file
			}
		}
		if len(opt.exclude) > 0 {
			if w.exclude, err = patternmatcher.New(opt.exclude); err != nil {
				return nil, fmt.Errorf("--exclude: %w", err)
			}
		}
		return w, nil
	}
	w, err := one()
	for range n {
		if err != nil {
			return nil, err
		}
		var h *walker
		h, err = one()
		helpers <- h
	}
	return w, err
}

// branch is what is in a folder.
type branch struct {
	items []item
	below []fork
}

// fork is what is in the folder that stands before items[at].
type fork struct {
	at int
	b  *branch
}

func (b *branch) count() int {
	n := len(b.items)
	for _, f := range b.below {
		n += f.b.count()
	}
	return n
}

// flat lists top and all items, a folder before what is in it.
func (b *branch) flat(top item) []item {
	return b.appendTo(append(make([]item, 0, 1+b.count()), top))
}

func (b *branch) appendTo(list []item) []item {
	done := 0
	for i, f := range b.below {
		list = append(list, b.items[done:f.at]...)
		done = f.at
		list = f.b.appendTo(list)
		b.below[i].b = nil // may go
	}
	return append(list, b.items[done:]...)
}

// walk gives what is in dir, which lies at p in the view. The items' rel begins below the folder that the first call is for.
func (w *walker) walk(dir *os.File, p string, parent patternmatcher.MatchInfo) (*branch, error) {
	skip := len(p)
	if p != "" {
		skip++
	}
	return w.folder(dir, p, skip, parent)
}

func (w *walker) folder(dir *os.File, p string, skip int, parent patternmatcher.MatchInfo) (_ *branch, err error) {
	if err := w.ctx.Err(); err != nil {
		return nil, err
	}
	paths, err := w.list(dir, p)
	if err != nil {
		return nil, err
	}
	b := &branch{items: make([]item, 0, len(paths))}
	var helped sync.WaitGroup
	var mu sync.Mutex // of b.below and errs while helpers are at work
	var errs []error
	defer func() {
		helped.Wait()
		if len(errs) > 0 {
			err = errors.Join(err, errs[0])
		}
	}()
	fd := int(dir.Fd())
	at := len(p)
	if p != "" {
		at++
	}
	for _, path := range paths {
		name := path[at:]
		it := item{path: path, rel: path[skip:]}
		ignored, excluded, info := false, false, patternmatcher.MatchInfo{}
		if w.ignore != nil {
			if ignored, info, err = w.ignore.MatchesUsingParentResults(it.path, parent); err != nil {
				return nil, err
			}
		}
		if w.exclude != nil {
			if excluded, err = w.exclude.MatchesOrParentMatches(it.rel); err != nil {
				return nil, err
			}
		}
		if ignored && !w.ignore.Exclusions() || excluded && !w.exclude.Exclusions() {
			continue
		}
		if found, err := w.look(fd, name, &it); err != nil {
			return nil, err
		} else if !found {
			continue
		}
		isDir := it.kind() == unix.S_IFDIR
		if ignored && (!isDir || !mayInclude(w.ignore.all(), it.path)) || excluded && (!isDir || !mayInclude(w.exclude, it.rel)) {
			continue
		}
		ignored = ignored || excluded
		b.items = append(b.items, it)
		if !isDir {
			continue
		}
		sub, err := openDirAt(fd, name)
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: it.path, Err: err}
		}
		if !ignored {
			select {
			case h := <-w.helpers:
				mu.Lock()
				i := len(b.below)
				b.below = append(b.below, fork{at: len(b.items)})
				mu.Unlock()
				helped.Go(func() {
					below, err := h.folder(sub, path, skip, info)
					sub.Close()
					w.helpers <- h
					mu.Lock()
					defer mu.Unlock()
					b.below[i].b = below
					if err != nil {
						errs = append(errs, err)
					}
				})
				continue
			default:
			}
		}
		below, err := w.folder(sub, path, skip, info)
		sub.Close()
		if err != nil {
			return nil, err
		}
		if ignored && len(below.items) == 0 {
			b.items = b.items[:len(b.items)-1] // nothing in it was brought back by a "!" pattern
			continue
		}
		mu.Lock()
		b.below = append(b.below, fork{len(b.items), below})
		mu.Unlock()
	}
	return b, nil
}

// look fills in an item; found is false when it is gone, or a socket, which no layer can have.
func (w *walker) look(dir int, name string, it *item) (found bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if err == unix.ENOENT {
			return false, nil // deleted since the folder was read
		}
		return false, &fs.PathError{Op: "stat", Path: it.path, Err: err}
	}
	it.st = statOf(&st)
	if it.kind() == unix.S_IFSOCK {
		return false, nil
	}
	var plain bool
	if it.known, plain = w.v.stats.seen(it.path, &it.st); plain {
		return true, nil
	}
	at := fmt.Sprintf("/proc/self/fd/%d/%s", dir, name)
	if it.kind() == unix.S_IFLNK {
		if it.link, err = os.Readlink(at); err != nil {
			return false, err
		}
	}
	it.xattrs, err = xattrs(at, false)
	return true, err
}

// list gives the paths of what is in dir, which lies at p, in byte order. They share their memory.
func (w *walker) list(dir *os.File, p string) ([]string, error) {
	if w.dirents == nil {
		w.dirents = make([]byte, 64<<10)
	}
	var all []byte
	var ends []int
	for {
		n, err := unix.Getdents(int(dir.Fd()), w.dirents)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "read folder", Path: p, Err: err}
		}
		if n <= 0 {
			break
		}
		for buf := w.dirents[:n]; len(buf) > direntName; {
			size := int(binary.NativeEndian.Uint16(buf[16:]))
			name := buf[direntName:size]
			if i := slices.Index(name, 0); i >= 0 {
				name = name[:i]
			}
			if binary.NativeEndian.Uint64(buf) != 0 && string(name) != "." && string(name) != ".." {
				if p != "" {
					all = append(append(all, p...), '/')
				}
				all = append(all, name...)
				ends = append(ends, len(all))
			}
			buf = buf[size:]
		}
	}
	text := string(all)
	paths := make([]string, len(ends))
	begin := 0
	for i, end := range ends {
		paths[i] = text[begin:end]
		begin = end
	}
	slices.Sort(paths)
	return paths, nil
}

// direntName is where a name begins in what getdents64(2) gives: inode, offset, u16 length, u8 type.
const direntName = 19

func openDirAt(dir int, name string) (*os.File, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}
