package layers

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"conex/internal/disk"
	"conex/internal/layertar"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// Lower returns the folders that overlayfs stacks to show the layers ids (bottom first), in overlayfs's order: top first. It
// mounts each layer that is not mounted yet, once, for everybody. The mounts stay until the layer is removed.
//
// There may be one folder more than layers: when a layer uses folders that its tar does not name ("a/b" without "a/"), its
// own "a" would mask the owner, mode and attributes that a lower layer gives to "a". A small layer of folders alone is then
// put on top, with the attributes that each such folder has from the topmost layer that names it.
func (s *Store) Lower(ctx context.Context, ids []ocispec.Digest) ([]string, error) {
	metas := make([]meta, len(ids))
	dirs := make([]string, len(ids)) // bottom first
	implied := false
	for k, id := range ids {
		m, err := s.load(id)
		if err != nil {
			return nil, err
		}
		drv, err := driverNamed(m.Driver)
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", id, err)
		}
		if dirs[k], err = drv.lower(ctx, s, m); err != nil {
			return nil, fmt.Errorf("mount layer %s: %w", id, err)
		}
		metas[k] = m
		// Below the lowest layer there is nothing to take attributes from.
		implied = implied || k > 0 && m.Implied > 0
	}
	out := make([]string, 0, len(dirs)+1)
	if implied {
		top, err := s.chain(ctx, ids, metas, dirs)
		if err != nil {
			return nil, fmt.Errorf("folder attributes of %s: %w", ids[len(ids)-1], err)
		}
		if top != "" {
			out = append(out, top)
		}
	}
	for k := len(dirs) - 1; k >= 0; k-- {
		out = append(out, dirs[k])
	}
	return out, nil
}

// chainInfo is <state>/layers/chain-<key>.json.
type chainInfo struct {
	IDs []ocispec.Digest `json:"ids"`
	// Lower is the folder to put on top; empty: none is needed.
	Lower string `json:"lower"`
}

// chain returns the folder with the attributes of a chain's implied folders, "" when the layers show the right ones already.
// The answer is computed once a boot and chain.
func (s *Store) chain(ctx context.Context, ids []ocispec.Digest, metas []meta, dirs []string) (string, error) {
	var names strings.Builder
	for _, id := range ids {
		names.WriteString(id.Encoded())
	}
	key := "chain-" + ocispec.FromBytes([]byte(names.String())).Encoded()[:32]
	record := filepath.Join(s.state, key+".json")
	var c chainInfo
	if err := disk.ReadJSON(record, &c); err == nil && (c.Lower == "" || usable(c.Lower)) {
		return c.Lower, nil
	}
	l, err := disk.AcquireContext(ctx, filepath.Join(s.state, key+".lock"))
	if err != nil {
		return "", err
	}
	defer l.Release()
	if err := disk.ReadJSON(record, &c); err == nil && (c.Lower == "" || usable(c.Lower)) {
		return c.Lower, nil
	}
	t, err := s.chainTree(metas, dirs)
	if err != nil {
		return "", err
	}
	c = chainInfo{IDs: ids}
	if t != nil && s.drv.name() == DriverEROFS {
		// Before the mount, which whoever takes mounts away finds by it: this process may be killed in between.
		c.Lower = filepath.Join(s.state, key)
		if err := disk.WriteJSON(record, c, disk.Volatile); err != nil {
			return "", err
		}
		_, err := s.publishChain(ctx, key, t)
		return c.Lower, err
	}
	if t != nil {
		if c.Lower, err = s.publishChain(ctx, key, t); err != nil {
			return "", err
		}
	}
	return c.Lower, disk.WriteJSON(record, c, disk.Volatile)
}

// usable tells a chain's folder that is in place from an empty mount point.
func usable(dir string) bool {
	if filepath.Base(dir) == "fs" {
		_, err := os.Lstat(dir)
		return err == nil
	}
	return isMounted(dir)
}

// publishChain makes the tree of folders visible in the driver's way.
func (s *Store) publishChain(ctx context.Context, key string, t *layertar.Tree) (string, error) {
	if s.drv.name() == DriverEROFS {
		at, index := filepath.Join(s.state, key), filepath.Join(s.state, key+".erofs")
		if err := os.Remove(index); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		if _, err := writeIndex(index, content{tree: t}); err != nil {
			return "", err
		}
		return at, mountIndex(index, nil, at)
	}
	st, err := s.root.Stage()
	if err != nil {
		return "", err
	}
	defer st.Close() // nothing is in it when published
	u := &unpacker{ctx: ctx}
	if err := u.unpack(filepath.Join(st.Dir, "fs"), t); err != nil {
		return "", err
	}
	dst := s.root.Path("layers", key)
	// What lies there may be of another boot, half written: it costs little to make it again.
	if err := s.root.Trash(dst); err != nil {
		return "", err
	}
	if _, err := st.Publish(dst); err != nil {
		return "", err
	}
	return filepath.Join(dst, "fs"), nil
}

// chainTree collects the folders whose attributes the topmost layer that has them only implies; nil: none.
func (s *Store) chainTree(metas []meta, dirs []string) (*layertar.Tree, error) {
	c := &chainWalk{roots: make([]*os.File, len(dirs)), implied: make([]map[string]bool, len(dirs)), known: map[string]*folder{}}
	defer func() {
		for _, f := range c.roots {
			if f != nil {
				f.Close()
			}
		}
	}()
	var paths []string
	for k := range dirs {
		f, err := os.OpenFile(dirs[k], unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		c.roots[k] = f
		if metas[k].Implied == 0 {
			continue
		}
		var list []string
		if err := disk.ReadJSON(filepath.Join(s.dir(metas[k].DiffID), "implied.json"), &list); err != nil {
			return nil, err
		}
		c.implied[k] = make(map[string]bool, len(list))
		for _, p := range list {
			c.implied[k][p] = true
		}
		if k > 0 {
			paths = append(paths, list...)
		}
	}
	return c.tree(paths)
}
