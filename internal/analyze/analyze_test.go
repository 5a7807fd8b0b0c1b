package analyze

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"conex/internal/blobs"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/linux/mount"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// testStore is a store in folders of the test.
type testStore struct {
	Store
	dir string
}

func newStore(t testing.TB, driver string) testStore {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("layers need root: owners, devices, mounts")
	}
	dir := filepath.Join(t.TempDir(), "root")
	root, err := disk.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	ls, err := layers.Open(root, layers.Options{Driver: driver, State: filepath.Join(t.TempDir(), "state")})
	if err != nil {
		if driver == layers.DriverEROFS {
			t.Skipf("no EROFS here: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ls.Unmount(); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return testStore{Store{image.Open(root, blobs.Open(root), ls), ls}, dir}
}

func eachDriver(t *testing.T, f func(t *testing.T, s testStore)) {
	for _, d := range []string{layers.DriverEROFS, layers.DriverDir} {
		t.Run(d, func(t *testing.T) { f(t, newStore(t, d)) })
	}
}

// entry is what a test puts into a layer: "d a" a folder, "f a/b 100" a file of so many bytes, "l a/c a/b" a hard link, "s a/x target" a
// symbolic link, "m a 700" gives the last entry a mode.
func layerTar(t testing.TB, lines ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, line := range lines {
		f := strings.SplitN(line, " ", 3)
		h := tar.Header{Name: f[1], Mode: 0o644, ModTime: time.Unix(1_600_000_000, 0), Format: tar.FormatPAX}
		switch f[0] {
		case "d":
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		case "D": // for others alone
			h.Typeflag, h.Mode = tar.TypeDir, 0o700
		case "f", "F":
			h.Typeflag = tar.TypeReg
			fmt.Sscan(f[2], &h.Size)
		case "l":
			h.Typeflag, h.Linkname = tar.TypeLink, f[2]
		case "s":
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f[2], 0o777
		default:
			t.Fatalf("unknown %q", line)
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		c := byte('x')
		if f[0] == "F" { // other bytes
			c = 'y'
		}
		if _, err := w.Write(bytes.Repeat([]byte{c}, int(h.Size))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// add makes an image of layers and tags it.
func (s testStore) add(t testing.TB, name string, tars ...[]byte) image.Image {
	t.Helper()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	c := ocispec.Image{}
	c.Created, c.OS, c.Architecture, c.RootFS.Type = &at, "linux", "amd64", "layers"
	for i, data := range tars {
		info, err := s.Layers.Import(context.Background(), bytes.NewReader(data), ocispec.FromBytes(data))
		if err != nil {
			t.Fatal(err)
		}
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, info.DiffID)
		c.History = append(c.History, ocispec.History{Created: &at, CreatedBy: fmt.Sprintf("RUN /bin/sh -c step %d # buildkit", i)},
			ocispec.History{CreatedBy: "ENV A=b", EmptyLayer: true})
	}
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	img, err := s.Images.Add(context.Background(), raw, "", "")
	if err != nil {
		t.Fatal(err)
	}
	ref, err := image.ParseReference(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Images.Tag(img.ID, ref); err != nil {
		t.Fatal(err)
	}
	return img
}

func (s testStore) look(t testing.TB, name string) *Image {
	t.Helper()
	img, err := s.Image(context.Background(), s.resolve(t, name))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func (s testStore) resolve(t testing.TB, name string) image.Image {
	t.Helper()
	img, err := s.Images.Resolve(name)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// changes lists what a layer did, a letter and a path each.
func changes(img *Image, layer int) string {
	var out []string
	img.EachChange(layer, func(n *Node, c Change) { out = append(out, string(c.Letter())+" "+n.Path()) })
	return strings.Join(out, "\n")
}

func TestChanges(t *testing.T) {
	base := []string{"d etc", "f etc/passwd 10", "f etc/shadow 20", "d var", "d var/cache", "f var/cache/a 1000", "f var/cache/b 500", "f tool 70", "s link tool", "f gone 3"}
	for _, c := range []struct {
		name  string
		layer []string
		want  string
		waste map[string]int64
	}{
		{"a new file in a folder that is named", []string{"d etc", "f etc/new 5"}, "A etc/new", nil},
		{"implied folders", []string{"f etc/deep/er/new 5", "f x/y 1"}, "A etc/deep\nA etc/deep/er\nA etc/deep/er/new\nA x\nA x/y", nil},
		{"overwritten", []string{"f etc/passwd 11"}, "C etc/passwd", map[string]int64{"etc/passwd": 10}},
		{"a folder's mode", []string{"D etc"}, "C etc", nil},
		{"deleted", []string{"f .wh.gone 0"}, "D gone", map[string]int64{"gone": 3}},
		{"deleted folder", []string{"f .wh.var 0"}, "D var\nD var/cache\nD var/cache/a\nD var/cache/b", map[string]int64{"var/cache/a": 1000, "var/cache/b": 500}},
		{"whiteout of nothing", []string{"f .wh.nothing 0", "f etc/.wh.nothing 0", "f none/.wh.nothing 0"}, "A none", nil},
		{"opaque folder", []string{"d var/cache", "f var/cache/.wh..wh..opq 0", "f var/cache/b 1"}, "D var/cache/a\nC var/cache/b", map[string]int64{"var/cache/a": 1000, "var/cache/b": 500}},
		{"opaque above", []string{"d var", "f var/.wh..wh..opq 0", "d var/cache", "f var/cache/c 1"}, "D var/cache/a\nD var/cache/b\nA var/cache/c", map[string]int64{"var/cache/a": 1000, "var/cache/b": 500}},
		{"file over folder", []string{"f var 7"}, "C var\nD var/cache\nD var/cache/a\nD var/cache/b", map[string]int64{"var/cache/a": 1000, "var/cache/b": 500}},
		{"folder over file", []string{"d tool", "f tool/x 1"}, "C tool\nA tool/x", map[string]int64{"tool": 70}},
		{"link over file", []string{"s tool link"}, "C tool", map[string]int64{"tool": 70}},
		{"deleted and made again in one layer", []string{"f .wh.tool 0", "f tool 71"}, "C tool", map[string]int64{"tool": 70}},
		{"empty files waste nothing", []string{"f zero 0"}, "A zero", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			eachDriver(t, func(t *testing.T, s testStore) {
				s.add(t, "i", layerTar(t, base...), layerTar(t, c.layer...))
				img := s.look(t, "i")
				if got := changes(img, 1); got != c.want {
					t.Errorf("changes:\n%s\nwant:\n%s", got, c.want)
				}
				sum, got := int64(0), map[string]int64{}
				for _, w := range img.Waste {
					got[w.Path] = w.Bytes
					sum += w.Bytes
				}
				if fmt.Sprint(got) != fmt.Sprint(c.waste) && len(got)+len(c.waste) > 0 {
					t.Errorf("waste %v, want %v", got, c.waste)
				}
				if img.Wasted != sum || img.Layers[0].Wasted != sum || img.Layers[1].Hides != sum || img.Layers[1].Wasted != 0 {
					t.Errorf("sums: %d, %+v", img.Wasted, img.Layers)
				}
				if want := 1 - float64(sum)/float64(img.Size); img.Efficiency() != want {
					t.Errorf("efficiency %v, want %v", img.Efficiency(), want)
				}
			})
		})
	}
}

// TestHardLinks: a file is wasted only when its last name is gone, and counts once.
func TestHardLinks(t *testing.T) {
	eachDriver(t, func(t *testing.T, s testStore) {
		first := layerTar(t, "f a 100", "l b a", "l c b")
		s.add(t, "one", first, layerTar(t, "f .wh.a 0", "f b 1"))
		img := s.look(t, "one")
		if img.Size != 101 || img.Wasted != 0 || img.Lookup("c").At(1).Links() != 3 {
			t.Errorf("with a name left: size %d, wasted %d", img.Size, img.Wasted)
		}
		s.add(t, "all", first, layerTar(t, "f .wh.a 0", "f b 1"), layerTar(t, "f .wh.c 0", "f b 2"))
		img = s.look(t, "all")
		if img.Wasted != 101 || len(img.Waste) != 2 || img.Waste[0].Path != "a" || img.Waste[0].Copies != 1 || !img.Waste[0].Deleted || img.Waste[1].Deleted {
			t.Errorf("without: %d, %+v", img.Wasted, img.Waste)
		}
	})
}

func TestCopies(t *testing.T) {
	s := newStore(t, layers.DriverDir)
	one := func(n int) []byte { return layerTar(t, fmt.Sprintf("f opt/app %d", n)) }
	s.add(t, "i", one(100), one(200), one(50), layerTar(t, "f opt/.wh.app 0"), one(10))
	img := s.look(t, "i")
	w := img.Waste
	if len(w) != 1 || w[0].Copies != 3 || w[0].Bytes != 350 || w[0].Deleted || !slices.Equal(w[0].Layers, []int{0, 1, 2}) {
		t.Errorf("%+v", w)
	}
	if got := changes(img, 4); got != "A opt/app" {
		t.Errorf("made again: %s", got)
	}
	if n := img.Lookup("opt/app"); n.At(3) != nil || n.Shown(3).Size != 50 || n.At(2).Size != 50 || n.At(1).Size != 200 || n.At(4).Size != 10 {
		t.Errorf("states %+v", n.States())
	}
	if img.Layers[0].CreatedBy != "RUN /bin/sh -c step 0 # buildkit" || Instruction(img.Layers[0].CreatedBy) != "RUN step 0" {
		t.Errorf("made by %q", img.Layers[0].CreatedBy)
	}
}

// TestPathEfficiency holds the other definition against sums by hand.
func TestPathEfficiency(t *testing.T) {
	s := newStore(t, layers.DriverDir)
	for i, c := range []struct {
		layers [][]string
		want   float64
	}{
		{[][]string{{"f a 100"}}, 1},
		{[][]string{{"f a 100", "f b 50"}, {"f a 60"}}, 110. / 210},
		{[][]string{{"f a 100", "f b 50"}, {"f .wh.a 0"}}, 50. / 150},
		// A deleted folder costs nothing there: its path is a file only where it is deleted, so the least copy is the only one.
		{[][]string{{"d d", "f d/a 100", "f b 50"}, {"f .wh.d 0"}}, 1},
		{[][]string{{"f a 100", "l b a"}, {"f c 1"}}, 1},
		{[][]string{{"d d"}}, 1},
	} {
		var tars [][]byte
		for _, l := range c.layers {
			tars = append(tars, layerTar(t, l...))
		}
		name := fmt.Sprintf("i%d", i)
		s.add(t, name, tars...)
		if got := s.look(t, name).PathEfficiency(); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("%v: %v, want %v", c.layers, got, c.want)
		}
	}
}

// pathEfficiencyByHand follows dive's definition over the tars alone: the leaves of each layer's tree, and for the whiteout of a folder what the
// layers below have in it.
func pathEfficiencyByHand(t *testing.T, tars [][]byte) float64 {
	type sum struct{ least, all int64 }
	paths := map[string]*sum{}
	stack := map[string]int64{} // size, -1 for a folder
	inside := func(dir string) (found []string) {
		for p := range stack {
			if strings.HasPrefix(p, dir+"/") {
				found = append(found, p)
			}
		}
		return found
	}
	for _, data := range tars {
		layer, gone := map[string]int64{}, []string{}
		r := tar.NewReader(bytes.NewReader(data))
		for h, err := r.Next(); err == nil; h, err = r.Next() {
			p := path.Clean(h.Name)
			for up := path.Dir(p); up != "."; up = path.Dir(up) {
				layer[up] = -1
			}
			switch base, wh := strings.CutPrefix(path.Base(p), ".wh."); {
			case wh:
				gone = append(gone, path.Join(path.Dir(p), base))
			case h.Typeflag == tar.TypeDir:
				layer[p] = -1
			default:
				layer[p] = h.Size
			}
		}
		count := func(p string, n int64) {
			if s := paths[p]; s == nil {
				paths[p] = &sum{n, n}
			} else {
				s.least, s.all = min(s.least, n), s.all+n
			}
		}
		for _, p := range gone {
			old, ok := stack[p]
			if !ok {
				continue
			}
			var n int64
			if old < 0 {
				for _, q := range inside(p) {
					n += max(0, stack[q])
				}
			}
			count(p, n)
		}
		for p, n := range layer {
			if n >= 0 {
				count(p, n)
			}
		}
		for _, p := range gone {
			for _, q := range append(inside(p), p) {
				delete(stack, q)
			}
		}
		for p, n := range layer {
			if n >= 0 {
				for _, q := range inside(p) {
					delete(stack, q)
				}
			}
			stack[p] = n
		}
	}
	var least, all int64
	for _, s := range paths {
		least += s.least
		all += s.all
	}
	if all == 0 {
		return 1
	}
	return float64(least) / float64(all)
}

func hasLinks(data []byte) bool {
	r := tar.NewReader(bytes.NewReader(data))
	for h, err := r.Next(); err == nil; h, err = r.Next() {
		if h.Typeflag == tar.TypeLink {
			return true
		}
	}
	return false
}

// TestPathEfficiencyOfRandom leaves opaque folders out, for which the definition has no word, and hard links: it counts the bytes at the name
// that the tar has first, we at the first in the order of names.
func TestPathEfficiencyOfRandom(t *testing.T) {
	s := newStore(t, layers.DriverDir)
	below := 0
	for seed := range uint64(40) {
		rnd := rand.New(rand.NewPCG(seed, 11))
		var tars [][]byte
		for len(tars) < 3 {
			if l := randomLayer(t, rnd); !bytes.Contains(l, []byte(".wh..wh..opq")) && !hasLinks(l) {
				tars = append(tars, l)
			}
		}
		name := fmt.Sprintf("r%d", seed)
		s.add(t, name, tars...)
		img := s.look(t, name)
		if got, want := img.PathEfficiency(), pathEfficiencyByHand(t, tars); math.Abs(got-want) > 1e-9 {
			t.Errorf("seed %d: %v, by hand %v", seed, got, want)
		}
		if img.PathEfficiency() < 1 {
			below++
		}
	}
	if below < 20 {
		t.Errorf("only %d images with waste: the test tests little", below)
	}
}

// TestOverlay puts random layers upon each other and compares the end with what the kernel's overlayfs shows, and the waste with a count
// by another way: inodes of which no name shows.
func TestOverlay(t *testing.T) {
	s := newStore(t, layers.DriverDir)
	for seed := range uint64(25) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		var tars [][]byte
		for range 4 {
			tars = append(tars, randomLayer(t, rnd))
		}
		name := fmt.Sprintf("r%d", seed)
		img := s.add(t, name, tars...)
		got := s.look(t, name)
		want := overlay(t, s, img.Layers())
		have := map[string]string{}
		var walk func(n *Node)
		walk = func(n *Node) {
			if st := n.At(3); st != nil && n.parent != nil {
				have[n.Path()] = fmt.Sprintf("%o %d", st.Mode, st.Size)
			} else if st == nil {
				return
			}
			for _, c := range n.children {
				walk(c)
			}
		}
		walk(got.Root())
		for p, w := range want {
			if have[p] != w {
				t.Errorf("seed %d: %s is %q, overlayfs has %q", seed, p, have[p], w)
			}
		}
		for p := range have {
			if want[p] == "" {
				t.Errorf("seed %d: %s is not in overlayfs", seed, p)
			}
		}
		if w := wastedByHand(t, tars); w != got.Wasted {
			t.Errorf("seed %d: wasted %d, by hand %d", seed, got.Wasted, w)
		}
	}
}

func randomLayer(t *testing.T, rnd *rand.Rand) []byte {
	used := map[string]byte{}
	var lines, files []string
	dirs := []string{""}
	for range 14 {
		p := path.Join(dirs[rnd.IntN(len(dirs))], string("abc"[rnd.IntN(3)]))
		if used[p] != 0 {
			continue
		}
		switch k := rnd.IntN(10); {
		case k < 3 && strings.Count(p, "/") < 3:
			used[p] = 'd'
			dirs = append(dirs, p)
			if rnd.IntN(4) > 0 { // else implied
				lines = append(lines, []string{"d ", "D "}[rnd.IntN(2)]+p)
			} else {
				lines = append(lines, fmt.Sprintf("f %s/z %d", p, rnd.IntN(50)))
				used[p+"/z"] = 'f'
			}
			if rnd.IntN(4) == 0 {
				lines = append(lines, "f "+p+"/.wh..wh..opq 0")
			}
		case k < 5:
			used[p] = 'w'
			lines = append(lines, "f "+path.Join(path.Dir(p), ".wh."+path.Base(p))+" 0")
		case k < 6 && len(files) > 0:
			used[p] = 'l'
			lines = append(lines, "l "+p+" "+files[rnd.IntN(len(files))])
		default:
			used[p] = 'f'
			files = append(files, p)
			lines = append(lines, fmt.Sprintf("f %s %d", p, 1+rnd.IntN(1000)))
		}
	}
	return layerTar(t, lines...)
}

// overlay is what the kernel shows of the layers, by path.
func overlay(t *testing.T, s testStore, ids []ocispec.Digest) map[string]string {
	lower, err := s.Layers.Lower(context.Background(), ids)
	if err != nil {
		t.Fatal(err)
	}
	top := t.TempDir()
	for _, d := range []string{"m", "u", "w"} {
		if err := os.Mkdir(filepath.Join(top, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m, err := mount.Overlay(mount.OverlayOptions{Lower: lower, Upper: filepath.Join(top, "u"), Work: filepath.Join(top, "w")})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	merged := filepath.Join(top, "m")
	at, err := os.OpenFile(merged, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer at.Close()
	if err := mount.Attach(m, at); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(merged, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	out := map[string]string{}
	err = filepath.WalkDir(merged, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == merged {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		if d.IsDir() {
			st.Size = 0
		}
		out[strings.TrimPrefix(p, merged+"/")] = fmt.Sprintf("%o %d", st.Mode, st.Size)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// wastedByHand reads the tars into one map of names and counts the inodes without a name.
func wastedByHand(t *testing.T, tars [][]byte) int64 {
	type inode struct{ size int64 }
	var all []*inode
	show := map[string]*inode{}
	for _, data := range tars {
		below := func(p string) (found []string) {
			for q := range show {
				if p == "" || strings.HasPrefix(q, p+"/") {
					found = append(found, q)
				}
			}
			return found
		}
		mine := map[string]*inode{}
		var order []string
		r := tar.NewReader(bytes.NewReader(data))
		for h, err := r.Next(); err == nil; h, err = r.Next() {
			p := path.Clean(h.Name)
			dir, base := path.Split(p)
			dir = strings.TrimSuffix(dir, "/")
			for up := dir; up != "" && up != "."; up = path.Dir(up) { // a folder takes the place of a file
				if i, ok := show[up]; ok && i != nil {
					delete(show, up)
				}
			}
			if base == ".wh..wh..opq" {
				for _, q := range below(dir) {
					delete(show, q)
				}
				continue
			}
			if gone, ok := strings.CutPrefix(base, ".wh."); ok {
				q := path.Join(dir, gone)
				delete(show, q)
				for _, q := range below(q) {
					delete(show, q)
				}
				continue
			}
			if h.Typeflag != tar.TypeDir {
				for _, q := range below(p) {
					delete(show, q)
				}
			}
			delete(show, p)
			switch h.Typeflag {
			case tar.TypeReg:
				i := &inode{h.Size}
				all = append(all, i)
				mine[p] = i
			case tar.TypeLink:
				mine[p] = mine[path.Clean(h.Linkname)]
			}
			order = append(order, p)
		}
		for _, p := range order {
			if mine[p] != nil {
				show[p] = mine[p]
			}
		}
	}
	var sum int64
	named := map[*inode]bool{}
	for _, i := range show {
		named[i] = true
	}
	for _, i := range all {
		if !named[i] {
			sum += i.size
		}
	}
	return sum
}

func TestHistory(t *testing.T) {
	s := newStore(t, layers.DriverDir)
	a, b, c := layerTar(t, "f a 1"), layerTar(t, "f b 1"), layerTar(t, "f c 1")
	for _, h := range []struct {
		history string
		want    string
	}{
		{`[]`, "||"},
		{`[{"created_by":"A"},{"created_by":"E","empty_layer":true},{"created_by":"B"}]`, "A|B|"},
		{`[{"created_by":"A"},{"created_by":"B"},{"created_by":"C"},{"created_by":"D"}]`, "A|B|C"},
	} {
		var conf ocispec.Image
		if err := json.Unmarshal([]byte(h.history), &conf.History); err != nil {
			t.Fatal(err)
		}
		for _, data := range [][]byte{a, b, c} {
			conf.RootFS.DiffIDs = append(conf.RootFS.DiffIDs, ocispec.FromBytes(data))
		}
		var got []string
		for _, st := range Steps(conf) {
			got = append(got, st.CreatedBy)
		}
		if strings.Join(got, "|") != h.want {
			t.Errorf("%s: %q", h.history, got)
		}
	}
	s.add(t, "x", a, b)
	s.add(t, "y", a, c)
	img := s.look(t, "x")
	if !slices.Equal(img.Layers[0].SharedWith, []string{"y:latest"}) || len(img.Layers[1].SharedWith) != 0 {
		t.Errorf("shared: %+v", img.Layers)
	}
}

// dirOf is where a layer lies.
func dirOf(s testStore, id ocispec.Digest) string {
	return filepath.Join(s.dir, "layers", id.Encoded())
}

func TestMissingLayer(t *testing.T) {
	s := newStore(t, layers.DriverDir)
	data := layerTar(t, "f a 1")
	img := s.add(t, "x", layerTar(t, "f b 2"), data)
	if err := os.RemoveAll(dirOf(s, img.Layers()[1])); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Image(context.Background(), s.resolve(t, "x")); !errors.Is(err, layers.ErrNotFound) {
		t.Errorf("%v", err)
	}
}

func TestWords(t *testing.T) {
	for in, want := range map[string]string{
		"plain":          "plain",
		"a b":            "a b",
		"\x1b[31mred":    `\x1b[31mred`,
		"two\nlines":     `two\nlines`,
		`back\slash`:     `back\\slash`,
		"bad\xff":        `bad\xff`,
		"\u202egpj":      `\u202egpj`,
		"e\u0301":        `e\u0301`,
		"日本語":            "日本語",
		"\ufffd":         "\ufffd",
		"\u200bzero":     `\u200bzero`,
		"\U000e0001tags": `\U000e0001tags`,
		"\u009b31m":      `\u009b31m`,
	} {
		if got := Printable(in); got != want {
			t.Errorf("Printable(%q) = %q, want %q", in, got, want)
		}
	}
	for in, want := range map[string]string{
		`/bin/sh -c #(nop)  CMD ["sh"]`:                        `CMD ["sh"]`,
		`/bin/sh -c apt-get update`:                            `RUN apt-get update`,
		`RUN /bin/sh -c apt-get   update  && 	true # buildkit`: `RUN apt-get update && true`,
		`|1 A=b /bin/sh -c make`:                               `RUN make`,
		`RUN |2 A=b C=d e /bin/sh -c make # buildkit`:          `RUN make`,
		`COPY . /app # buildkit`:                               `COPY . /app`,
		"RUN /bin/sh -c printf 'a\\n' \x1b[2J # buildkit":      `RUN printf 'a\n' \x1b[2J`,
		"": "",
	} {
		if got := Instruction(in); got != want {
			t.Errorf("Instruction(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestJSON(t *testing.T) {
	s := newStore(t, layers.DriverDir)
	s.add(t, "x", layerTar(t, "d d", "f d/a\xff 10", "l h d/a\xff", "s s <t>"), layerTar(t, "f d/.wh.a\xff 0", "f h 1"))
	var b bytes.Buffer
	if err := s.look(t, "x").WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Schema     int
		Efficiency float64
		Wasted     int64
		Image      struct{ Tags []string }
		Layers     []struct {
			Instruction    string
			Added, Removed int
			SharedWith     []string
			Files          []struct{ Path, PathBase64, Change, Type, Mode, LinkTarget, HardLinkTo, ModTime string }
		}
		Waste []struct {
			Path, PathBase64 string
			Copies           int
			Bytes            int64
			Layers           []int
		}
	}
	if err := json.Unmarshal(b.Bytes(), &got); err != nil {
		t.Fatalf("%v\n%s", err, b.Bytes())
	}
	f := got.Layers[0].Files
	if got.Schema != 1 || got.Wasted != 10 || len(got.Layers) != 2 || got.Layers[0].SharedWith == nil || len(f) != 4 || f[1].PathBase64 != "L2QvYf8=" ||
		f[1].Change != "added" || f[1].Mode != "0644" || f[2].HardLinkTo == "" || f[3].LinkTarget != "<t>" || got.Layers[1].Files[0].Change != "removed" ||
		len(got.Waste) != 1 || got.Waste[0].Bytes != 10 {
		t.Errorf("%s", b.Bytes())
	}
}

// BenchmarkImage looks at an image of 300,000 files in three layers.
func BenchmarkImage(b *testing.B) {
	s := newStore(b, layers.DriverEROFS)
	var tars [][]byte
	for l := range 3 {
		var lines []string
		for i := range 100_000 {
			lines = append(lines, fmt.Sprintf("f usr/share/l%d/d%03d/some-file-name-%d 10", l, i/300, i))
		}
		tars = append(tars, layerTar(b, lines...))
	}
	s.add(b, "x", tars...)
	b.ReportAllocs()
	for b.Loop() {
		s.look(b, "x")
	}
}

// FuzzWords: whatever a name or an instruction is, nothing that moves a cursor comes out, and different names stay different.
func FuzzWords(f *testing.F) {
	for _, s := range []string{"a", "\x1b]0;t\a", "a\nb", "\xff\xfe", "|1 A /bin/sh -c x", `\x1b`, "\u202e", "\u2028"} {
		f.Add(s, s+"\n")
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		pa, pb := Printable(a), Printable(b)
		if a != b && pa == pb {
			t.Errorf("%q and %q are both shown as %q", a, b, pa)
		}
		for _, out := range []string{pa, Line(a), Instruction(a)} {
			if strings.ContainsFunc(out, func(r rune) bool { return !visible(r) }) || !utf8.ValidString(out) {
				t.Errorf("%q is shown as %q", a, out)
			}
		}
	})
}
