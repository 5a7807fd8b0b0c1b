package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"conex/internal/disk"
)

// The folders of buildcache/ that keep what came from elsewhere.
const (
	treeFolder = "tree"
	httpFolder = "http"
)

// treeInfo is buildcache/tree/<key>/info.json: for people, and for lists. It has no passwords.
type treeInfo struct {
	// Source says where the files are from; Commit which they are.
	Source  string    `json:"source"`
	Commit  string    `json:"commit,omitempty"`
	Created time.Time `json:"created"`
}

// cachedTree is a folder of files in buildcache/tree, held against pruning.
type cachedTree struct {
	dir  string
	lock *disk.Lock
}

func (t *cachedTree) close() error {
	t.lock.Release()
	return nil
}

// cachedTree gives the folder that the ingredients name, which fill makes when it is missing: one process does, the others wait. fill
// gets two empty folders, one for the files and one for whatever else it needs. A killed fill leaves nothing but what a sweep takes.
func (b *Builder) cachedTree(ctx context.Context, ingredients []string, info treeInfo, fill func(ctx context.Context, files, scratch string) error) (*cachedTree, error) {
	sum := sha256.Sum256([]byte(strings.Join(append([]string{"1"}, ingredients...), "\x00")))
	dir := b.Root.Path("buildcache", treeFolder, hex.EncodeToString(sum[:16]))
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return nil, fmt.Errorf("build cache: %w", err)
	}
	for {
		// Shared by readers: a prune passes it by.
		l, err := disk.AcquireSharedContext(ctx, dir+".lock")
		if err != nil {
			return nil, err
		}
		now := time.Now()
		err = os.Chtimes(dir, now, now)
		if err == nil {
			return &cachedTree{dir: filepath.Join(dir, "files"), lock: l}, nil
		}
		l.Release()
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("build cache: %w", err)
		}
		// Not waited for: whoever was faster holds it as a reader by now, for as long as its build lasts.
		l, err = disk.TryAcquire(dir + ".lock")
		if errors.Is(err, disk.ErrLocked) {
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-time.After(time.Millisecond):
				continue
			}
		}
		if err != nil {
			return nil, err
		}
		err = b.fillTree(ctx, dir, info, fill)
		l.Release()
		if err != nil {
			return nil, err
		}
	}
}

func (b *Builder) fillTree(ctx context.Context, dir string, info treeInfo, fill func(ctx context.Context, files, scratch string) error) (err error) {
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err // another process made it
	}
	st, err := b.Root.Stage()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	tree, scratch := filepath.Join(st.Dir, "tree"), filepath.Join(st.Dir, "scratch")
	for _, d := range []string{tree, filepath.Join(tree, "files"), scratch} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	if err := fill(ctx, filepath.Join(tree, "files"), scratch); err != nil {
		return err
	}
	info.Created = time.Now().UTC()
	if err := disk.WriteJSON(filepath.Join(tree, "info.json"), info, disk.Volatile); err != nil {
		return err
	}
	// A power loss must not leave a tree that lacks contents: it is named by what it holds.
	if err := disk.SyncFS(tree); err != nil {
		return err
	}
	b.fetched.Store(true)
	_, err = st.Publish(dir, "tree")
	return err
}
