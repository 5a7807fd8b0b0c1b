// Package collect owns leases/: who is using blobs and layers that no image or container names yet, and the sweep that removes what
// nobody uses.
//
// Files:
//
//	leases/gc.lock     flock: shared while a lease is made or named a digest, exclusive while a sweep runs
//	leases/<id>        one lease: its owner holds it under flock as long as it lives; lines "open" or a digest
//	leases/pending     a sweep had to leave everything because of an open lease; the next complete sweep removes it
//	leases/left        a sweep had to leave something because a lease names it; the next complete sweep removes it
//
// A lease dies with its process, because the kernel drops the flock; there are no expiry times.
package collect

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

// open is the line of a lease that protects everything.
const open = "open"

func gcLock(root *disk.Root) string  { return root.Path("leases", "gc.lock") }
func pending(root *disk.Root) string { return root.Path("leases", "pending") }
func left(root *disk.Root) string    { return root.Path("leases", "left") }

// isLease tells a lease's file from the others.
func isLease(root *disk.Root, e fs.DirEntry) bool {
	path := root.Path("leases", e.Name())
	return path != gcLock(root) && path != pending(root) && path != left(root) && e.Type().IsRegular() && !disk.IsTemp(e.Name())
}

// Lease protects digests (layers, blobs) from Sweep while its process lives or until Close.
type Lease struct {
	root *disk.Root
	path string
	lock *disk.Lock

	mu   sync.Mutex
	held map[ocispec.Digest]bool // what Claim has added
}

// NewLease makes an open lease, for whoever makes layers and blobs whose digests it can't name in time: while it lives, a sweep leaves all
// of them alone, so the disk may fill meanwhile. Who may take long (a build) holds an empty lease instead and claims each layer on its way
// into the store: layers.Store.Claiming(lease.Claim).
func NewLease(root *disk.Root) (*Lease, error) { return newLease(root, []string{open}) }

// Hold makes a lease on digests that are known. Everything of it that exists when Hold returns stays; what does not exist may be
// put there afterwards and stays too. So: Hold first, then look whether a layer is there.
func Hold(root *disk.Root, digests ...ocispec.Digest) (*Lease, error) {
	lines := make([]string, len(digests))
	for i, d := range digests {
		lines[i] = string(d)
	}
	return newLease(root, lines)
}

func newLease(root *disk.Root, lines []string) (*Lease, error) {
	gc, err := disk.AcquireShared(gcLock(root))
	if err != nil {
		return nil, fmt.Errorf("make lease: %w", err)
	}
	defer gc.Release()
	path := root.Path("leases", disk.RandomID()[:16])
	l, err := disk.Acquire(path)
	if err != nil {
		return nil, fmt.Errorf("make lease: %w", err)
	}
	le := &Lease{root: root, path: path, lock: l}
	if err := le.write(lines); err != nil {
		le.Close()
		return nil, err
	}
	return le, nil
}

// write appends lines in one call, so that a reader never sees half a digest unless the disk is full (an error here).
func (l *Lease) write(lines []string) error {
	if len(lines) == 0 {
		return nil
	}
	if _, err := l.lock.File().WriteString(strings.Join(lines, "\n") + "\n"); err != nil {
		return fmt.Errorf("write lease: %w", err)
	}
	return nil
}

// Add names further digests. It waits while a sweep runs; what a sweep removed before Add returns is gone, so with a sealed lease
// look only afterwards whether a layer is there.
func (l *Lease) Add(digests ...ocispec.Digest) error {
	gc, err := disk.AcquireShared(gcLock(l.root))
	if err != nil {
		return fmt.Errorf("extend lease: %w", err)
	}
	defer gc.Release()
	lines := make([]string, len(digests))
	for i, d := range digests {
		lines[i] = string(d)
	}
	return l.write(lines)
}

// Claim is Add for who names the same digests again and again: those that it has added cost nothing. It may be called by several goroutines.
func (l *Lease) Claim(digests ...ocispec.Digest) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var todo []ocispec.Digest
	for _, d := range digests {
		if !l.held[d] {
			todo = append(todo, d)
		}
	}
	if len(todo) == 0 {
		return nil
	}
	if err := l.Add(todo...); err != nil {
		return err
	}
	if l.held == nil {
		l.held = map[ocispec.Digest]bool{}
	}
	for _, d := range todo {
		l.held[d] = true
	}
	return nil
}

// Close gives the protection up. Safe to call twice and on nil.
func (l *Lease) Close() error {
	if l == nil || l.lock == nil {
		return nil
	}
	err := os.Remove(l.path) // before the lock goes: nobody can take a file that has no name
	l.lock.Release()
	l.lock = nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("close lease: %w", err)
	}
	return nil
}

// leases gathers what live leases name, and whether one of them is open. With clear it removes the files of dead ones. The caller holds
// gc.lock.
func leases(root *disk.Root, clear bool) (marks map[ocispec.Digest]bool, anyOpen bool, err error) {
	entries, err := os.ReadDir(root.Path("leases"))
	if err != nil {
		return nil, false, fmt.Errorf("read leases: %w", err)
	}
	marks = map[ocispec.Digest]bool{}
	for _, e := range entries {
		path := root.Path("leases", e.Name())
		if !isLease(root, e) {
			// Marks are written under gc.lock alone: what is half written now was a dead process's.
			if clear && disk.IsTemp(e.Name()) {
				os.Remove(path) //nolint:errcheck // the next one tries again
			}
			continue
		}
		if !clear && !disk.Held(path) {
			continue
		}
		l, err := disk.TryAcquire(path)
		if err == nil { // its owner is dead
			err = os.Remove(path)
			l.Release()
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, false, fmt.Errorf("remove dead lease: %w", err)
			}
			continue
		}
		if !errors.Is(err, disk.ErrLocked) {
			return nil, false, fmt.Errorf("read leases: %w", err)
		}
		isOpen, err := readLease(path, marks)
		if err != nil {
			return nil, false, err
		}
		anyOpen = anyOpen || isOpen
	}
	return marks, anyOpen, nil
}

func readLease(path string, marks map[ocispec.Digest]bool) (isOpen bool, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // closed meanwhile
	}
	if err != nil {
		return false, fmt.Errorf("read lease: %w", err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		if sc.Text() == open {
			isOpen = true
			continue
		}
		marks[ocispec.Digest(sc.Text())] = true
	}
	return isOpen, sc.Err()
}

// Dead lists the files of leases whose owners are dead. The next sweep removes them.
func Dead(root *disk.Root) ([]string, error) {
	entries, err := os.ReadDir(root.Path("leases"))
	if err != nil {
		return nil, fmt.Errorf("read leases: %w", err)
	}
	var dead []string
	for _, e := range entries {
		path := root.Path("leases", e.Name())
		if !isLease(root, e) || disk.Held(path) {
			continue
		}
		if _, err := os.Lstat(path); err == nil { // not closed meanwhile
			dead = append(dead, path)
		}
	}
	return dead, nil
}

// Still runs fn while no sweep runs and no lease is made: what fn finds missing is missing for good.
func Still(ctx context.Context, root *disk.Root, fn func() error) error {
	gc, err := disk.AcquireContext(ctx, gcLock(root))
	if err != nil {
		return err
	}
	defer gc.Release()
	return fn()
}
