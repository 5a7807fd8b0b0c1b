package layers

import (
	"archive/tar"
	"fmt"
	"os"
	"sort"
	"strings"
	"time"

	"conex/internal/layertar"

	"golang.org/x/sys/unix"
)

// chainWalk looks at paths in a chain of layers (bottom first) as overlayfs would merge them.
type chainWalk struct {
	roots   []*os.File
	implied []map[string]bool
	known   map[string]*folder
}

// folder is what a path is in the merged view. A nil *folder: no folder.
type folder struct {
	// masked says that the layers alone would show other attributes than h.
	masked bool
	h      *tar.Header
}

// tree makes a tree of the masked folders among paths and all folders above them; nil when there are none.
func (c *chainWalk) tree(paths []string) (*layertar.Tree, error) {
	sort.Strings(paths)
	t := layertar.NewTree()
	added := map[string]bool{}
	for _, p := range paths {
		f, err := c.folder(p)
		if err != nil {
			return nil, err
		}
		if f == nil || !f.masked {
			continue
		}
		for k := 0; k <= len(p); k++ {
			if k < len(p) && p[k] != '/' || added[p[:k]] {
				continue
			}
			up, err := c.folder(p[:k])
			if err != nil {
				return nil, err
			}
			if _, err := t.Add(up.h, 0); err != nil {
				return nil, err
			}
			added[p[:k]] = true
		}
	}
	if len(added) == 0 {
		return nil, nil
	}
	// The new layer's root is the topmost one: it must look like the one that was.
	root, _, err := c.look(len(c.roots)-1, "")
	if err != nil {
		return nil, err
	}
	if _, err := t.Add(root, 0); err != nil {
		return nil, err
	}
	t.Finish()
	return t, nil
}

// folder finds a path's attributes: those of the topmost layer that names it as a folder, unless something in between
// hides that layer.
func (c *chainWalk) folder(path string) (*folder, error) {
	if f, ok := c.known[path]; ok {
		return f, nil
	}
	var f *folder
	for k := len(c.roots) - 1; k >= 0; k-- {
		h, hides, err := c.look(k, path)
		if err != nil {
			return nil, err
		}
		if h != nil {
			named := !c.implied[k][path]
			switch {
			case f == nil:
				f = &folder{h: h}
				hides = hides || named
			case named:
				f = &folder{h: h, masked: true}
				hides = true
			}
		}
		if hides {
			break
		}
	}
	c.known[path] = f
	return f, nil
}

// look returns the folder at path in layer k (nil if there is none), and whether the layer hides what lower ones have there.
func (c *chainWalk) look(k int, path string) (h *tar.Header, hides bool, err error) {
	cur, err := open(int(c.roots[k].Fd()), ".", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, false, err
	}
	defer func() { cur.Close() }()
	// An opaque folder hides what is in the one below it, not that one's attributes.
	opaque := false
	if path != "" {
		for part := range strings.SplitSeq(path, "/") {
			var st unix.Stat_t
			err := unix.Fstatat(int(cur.Fd()), part, &st, unix.AT_SYMLINK_NOFOLLOW)
			if err == unix.ENOENT {
				return nil, hides || opaque, nil
			}
			if err != nil {
				return nil, false, fmt.Errorf("%s: %w", path, err)
			}
			if st.Mode&unix.S_IFMT != unix.S_IFDIR { // a whiteout, or a file in the folder's place
				return nil, true, nil
			}
			next, err := open(int(cur.Fd()), part, unix.O_PATH|unix.O_DIRECTORY, 0)
			if err != nil {
				return nil, false, err
			}
			cur.Close()
			cur = next
			hides = hides || opaque
			v, err := getXattr(fmt.Sprintf("/proc/self/fd/%d/.", cur.Fd()), overlayPrefix()+"opaque")
			if err != nil && err != unix.ENODATA && err != unix.ENOTSUP {
				return nil, false, fmt.Errorf("%s: %w", path, err)
			}
			opaque = v == "y"
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(cur.Fd()), &st); err != nil {
		return nil, false, err
	}
	x, _, err := readXattrs(fmt.Sprintf("/proc/self/fd/%d/.", cur.Fd()))
	if err != nil {
		return nil, false, err
	}
	return &tar.Header{
		Typeflag: tar.TypeDir, Name: "./" + path, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Sec, st.Mtim.Nsec), PAXRecords: x,
	}, hides, nil
}
