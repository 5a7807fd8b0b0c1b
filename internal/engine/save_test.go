package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"conex/internal/archive"
	"conex/internal/collect"
	"conex/internal/config"
	"conex/internal/ocispec"
	"conex/internal/registry"
)

// save returns the archive of images.
func save(t *testing.T, e *Engine, req SaveRequest) (b []byte, remarks []string) {
	t.Helper()
	var buf bytes.Buffer
	req.Output = &buf
	remarks, err := e.Save(bg, req)
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), remarks
}

// load loads an archive, as a file or as a stream.
func load(t *testing.T, e *Engine, b []byte, stream bool, platforms ...string) []Loaded {
	t.Helper()
	loaded, err := tryLoad(t, e, b, stream, platforms...)
	if err != nil {
		t.Fatal(err)
	}
	return loaded
}

func tryLoad(t *testing.T, e *Engine, b []byte, stream bool, platforms ...string) ([]Loaded, error) {
	t.Helper()
	req := LoadRequest{Platforms: platforms, Stdin: bytes.NewReader(b)}
	if !stream {
		req.Input = filepath.Join(t.TempDir(), "archive.tar")
		if err := os.WriteFile(req.Input, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return e.Load(bg, req)
}

// pulledEngine has an image that was pulled: of a gzip, a zstd and a plain layer.
func pulledEngine(t *testing.T) (*Engine, *pushed, ocispec.Descriptor) {
	t.Helper()
	host := memoryRegistry(t)
	e := newImageEngine(t, "http://"+host)
	p := newPushed(t, tarOf(t, map[string]string{"a": strings.Repeat("a", 1<<20)}), tarOf(t, map[string]string{"b": "b"}), tarOf(t, map[string]string{"c": "c"}))
	desc := p.push(t, host, "library/app", "latest")
	if _, _, err := e.Pull(bg, PullRequest{Reference: "app"}); err != nil {
		t.Fatal(err)
	}
	return e, p, desc
}

// TestSaveLoad moves a pulled image through archives of both forms: configs stay as they are, in an OCI one manifest and compressed
// layers too, however often.
func TestSaveLoad(t *testing.T) {
	e, p, desc := pulledEngine(t)
	img, err := imageStore(t, e).Resolve("app")
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"docker-archive", "oci-archive"} {
		b, remarks := save(t, e, SaveRequest{Images: []string{"app"}, Format: format})
		if len(remarks) > 0 {
			t.Errorf("%s: %q", format, remarks)
		}
		for i, packed := range p.packed {
			if (format == "oci-archive" || i == 2) != bytes.Contains(b, packed) {
				t.Errorf("%s: layer %d as it came: %t", format, i, format != "oci-archive")
			}
		}
		for _, stream := range []bool{false, true} {
			other := newImageEngine(t)
			loaded := load(t, other, b, stream)
			if len(loaded) != 1 || loaded[0] != (Loaded{Reference: "app:latest", ID: string(img.ID)}) {
				t.Errorf("loaded %+v", loaded)
			}
			got, err := imageStore(t, other).Resolve("app")
			if err != nil || !bytes.Equal(got.RawConfig, img.RawConfig) {
				t.Errorf("%s: the config differs, %v", format, err)
			}
			if (got.Manifest == desc.Digest) != (format == "oci-archive") {
				t.Errorf("%s: manifest %q", format, got.Manifest)
			}
			if again, _ := save(t, other, SaveRequest{Images: []string{"app"}, Format: format}); !bytes.Equal(again, b) {
				t.Errorf("%s, stream %t: saved again it differs", format, stream)
			}
			// Everything is there: nothing is written.
			load(t, other, b, stream)
			wantEmpty(t, other, "staging", "downloads", "leases", "trash")
			if err := verifyAll(other); err != nil {
				t.Error(err)
			}
			if _, err := other.RemoveImage(bg, "app", RemoveImageRequest{}); err != nil {
				t.Fatal(err)
			}
			wantEmpty(t, other, "layers", "blobs/sha256", "images", "downloads")
		}
	}
}

func verifyAll(e *Engine) error {
	ls, err := e.Layers()
	if err != nil {
		return err
	}
	all, err := ls.List()
	for _, l := range all {
		err = errors.Join(err, ls.Verify(bg, l.DiffID))
	}
	return err
}

// TestSaveWithoutBlobs has the compressed layers gone: the archive has others, and a remark.
func TestSaveWithoutBlobs(t *testing.T) {
	e, p, desc := pulledEngine(t)
	if err := e.Blobs().Remove(ocispec.FromBytes(p.packed[0])); err != nil {
		t.Fatal(err)
	}
	b, remarks := save(t, e, SaveRequest{Images: []string{"app"}, Format: "oci-archive"})
	if len(remarks) != 1 || !strings.Contains(remarks[0], string(desc.Digest)) || !strings.HasPrefix(remarks[0], "app:latest: ") {
		t.Errorf("remarks %q", remarks)
	}
	other := newImageEngine(t)
	other.cfg.KeepBlobs = config.KeepNever
	load(t, other, b, false)
	if img, err := imageStore(t, other).Resolve("app"); err != nil || img.Manifest == desc.Digest || img.Manifest == "" {
		t.Errorf("manifest %q, %v", img.Manifest, err)
	}
	// With keep-blobs = "never" the compressed layers of an archive stay in it.
	e2, _, _ := pulledEngine(t)
	b, _ = save(t, e2, SaveRequest{Images: []string{"app"}, Format: "oci-archive"})
	third := newImageEngine(t)
	third.cfg.KeepBlobs = config.KeepNever
	load(t, third, b, false)
	if n := len(entries(t, third, "blobs/sha256")); n != 2 {
		t.Errorf("%d blobs, want config and manifest", n)
	}
	wantEmpty(t, third, "downloads")
}

// TestSaveCompressed has layers compressed for an archive: the same bytes each time, and any format of them is loaded.
func TestSaveCompressed(t *testing.T) {
	e := newImageEngine(t)
	content := strings.Repeat("compressible ", 1<<18)
	if _, err := e.Import(bg, ImportRequest{Source: "-", Stdin: bytes.NewReader(tarOf(t, map[string]string{"f": content})), Reference: "app"}); err != nil {
		t.Fatal(err)
	}
	want, err := imageStore(t, e).Resolve("app")
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"gzip", "zstd"} {
		for _, format := range []string{"docker-archive", "oci-archive"} {
			req := SaveRequest{Images: []string{"app"}, Format: format, Compression: kind}
			b, _ := save(t, e, req)
			if again, _ := save(t, e, req); !bytes.Equal(again, b) || len(b) > len(content)/4 {
				t.Errorf("%s %s: %d bytes, the same again: %t", format, kind, len(b), bytes.Equal(again, b))
			}
			for _, stream := range []bool{true, false} {
				other := newImageEngine(t)
				load(t, other, b, stream)
				if got, err := imageStore(t, other).Resolve("app"); err != nil || got.ID != want.ID {
					t.Errorf("%s %s: %s, %v", format, kind, got.ID, err)
				}
				// Its manifest is in the archive, so it stays, and asked for the same form once more nothing is compressed.
				if again, remarks := save(t, other, SaveRequest{Images: []string{"app"}, Format: "oci-archive"}); len(remarks) > 0 || format == "oci-archive" && !bytes.Equal(again, b) {
					t.Errorf("%s %s: saved again it differs, %q", format, kind, remarks)
				}
				if again, _ := save(t, other, req); !bytes.Equal(again, b) {
					t.Errorf("%s %s: compressed again it differs", format, kind)
				}
			}
		}
	}
	wantEmpty(t, e, "staging", "leases")
	// None at all where there are some.
	pulled, p, _ := pulledEngine(t)
	if b, _ := save(t, pulled, SaveRequest{Images: []string{"app"}, Format: "oci-archive", Compression: "none"}); !bytes.Contains(b, p.tars[0]) || bytes.Contains(b, p.packed[0]) {
		t.Error("layers are compressed")
	}
	ctx, cancel := context.WithCancel(bg)
	cancel()
	if _, err := e.Save(ctx, SaveRequest{Images: []string{"app"}, Compression: "gzip", Output: io.Discard}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	wantEmpty(t, e, "staging", "leases")
}

// TestSaveNames has what save may be asked for, in Docker's manner.
func TestSaveNames(t *testing.T) {
	e := newImageEngine(t)
	ids := map[string]string{}
	for _, name := range []string{"app:1", "other"} {
		id, err := e.Import(bg, ImportRequest{Source: "-", Stdin: bytes.NewReader(tarOf(t, map[string]string{"name": name})), Reference: name})
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = id
	}
	for _, tag := range []string{"app:2", "example.com/app:1"} {
		if err := e.Tag(bg, "app:1", tag); err != nil {
			t.Fatal(err)
		}
	}
	app := ids["app:1"]
	for what, want := range map[string]string{
		"app":                     "app:1 app:2",
		"app:2":                   "app:2",
		"app:2 app:1 app:2":       "app:2 app:1",
		"app:1 other":             "app:1 other:latest",
		"other":                   "other:latest",
		app:                       "",
		app[7:19]:                 "",
		app[7:19] + " app:1":      "app:1",
		"example.com/app:1 app:1": "example.com/app:1 app:1",
	} {
		b, _ := save(t, e, SaveRequest{Images: strings.Fields(what)})
		a, err := archive.File(bg, bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, tag := range a.Tags {
			got = append(got, tag.Reference.Familiar())
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %v, want %s", what, got, want)
		}
	}
	for _, c := range []struct {
		req  SaveRequest
		want string
	}{
		{SaveRequest{Images: []string{"app:3"}}, "No such image: app:3"},
		{SaveRequest{Images: []string{"app"}, Platforms: []string{"linux/s390x"}}, "image with reference docker.io/library/app:1 was found but does not provide the specified platform (linux/s390x)"},
		{SaveRequest{Images: []string{"app"}, Platforms: []string{"a/b/c/d"}}, "invalid platform"},
		{SaveRequest{Images: []string{"app"}, Platforms: []string{"all", "linux/amd64"}}, "--platform all stands alone"},
		{SaveRequest{Images: []string{"app"}, Format: "x"}, `unknown format "x"`},
		{SaveRequest{Images: []string{"app"}, Compression: "x"}, `unknown compression "x"`},
	} {
		c.req.Output = io.Discard
		if _, err := e.Save(bg, c.req); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %s", c.req, err, c.want)
		}
	}
}

// TestSavePlatforms moves an index with two platforms.
func TestSavePlatforms(t *testing.T) {
	host := memoryRegistry(t)
	e := newImageEngine(t, "http://"+host)
	own, idx := registry.HostPlatform(), ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	foreign := ocispec.Platform{OS: "linux", Architecture: "s390x"}
	idx.SchemaVersion = 2
	for _, plat := range []ocispec.Platform{own, foreign} {
		p := newPushed(t, tarOf(t, map[string]string{"arch": plat.Architecture}))
		p.config.Platform = plat
		d := p.push(t, host, "library/app", plat.Architecture)
		d.Platform = &plat
		idx.Manifests = append(idx.Manifests, d)
	}
	raw, err := json.Marshal(idx)
	if err != nil {
		t.Fatal(err)
	}
	pushManifest(t, host, "library/app", "latest", idx.MediaType, raw)
	for _, p := range idx.Manifests {
		if _, _, err := e.Pull(bg, PullRequest{Reference: "app", Platform: registry.FormatPlatform(*p.Platform)}); err != nil {
			t.Fatal(err)
		}
	}
	variants := func(e *Engine) (archs []string, index ocispec.Digest) {
		imgs, index, err := imageStore(t, e).Variants("app")
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range imgs {
			archs = append(archs, i.Config.Architecture)
		}
		return archs, index
	}
	for _, c := range []struct {
		save, load []string
		format     string
		want       []string
		index      bool // the one of the registry
	}{
		{nil, nil, "oci-archive", []string{own.Architecture}, false},
		{nil, nil, "docker-archive", []string{own.Architecture}, false},
		{[]string{"all"}, nil, "oci-archive", []string{own.Architecture, "s390x"}, true},
		{[]string{"linux/s390x", "linux/" + own.Architecture}, nil, "oci-archive", []string{own.Architecture, "s390x"}, true},
		{[]string{"all"}, []string{"linux/s390x"}, "oci-archive", []string{"s390x"}, true},
		{[]string{"all"}, nil, "docker-archive", []string{own.Architecture, "s390x"}, false},
		{[]string{"linux/s390x"}, nil, "docker-archive", []string{"s390x"}, false},
	} {
		b, remarks := save(t, e, SaveRequest{Images: []string{"app"}, Platforms: c.save, Format: c.format})
		other := newImageEngine(t)
		loaded := load(t, other, b, len(c.want) > 1, c.load...)
		archs, index := variants(other)
		if len(loaded) != 1 || !slices.Equal(archs, c.want) || (index == ocispec.FromBytes(raw)) != c.index || len(remarks) > 0 {
			t.Errorf("%+v: %+v, %v of %s, %q", c, loaded, archs, index, remarks)
		}
	}
	b, _ := save(t, e, SaveRequest{Images: []string{"app"}, Platforms: []string{"all"}})
	if _, err := tryLoad(t, newImageEngine(t), b, false, "linux/riscv64"); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "no image for platform linux/riscv64, there are linux/") {
		t.Errorf("got %v", err)
	}
}

// TestLoadMovesTags loads over names that other images have.
func TestLoadMovesTags(t *testing.T) {
	e := newImageEngine(t)
	imp := func(content string) string {
		id, err := e.Import(bg, ImportRequest{Source: "-", Stdin: bytes.NewReader(tarOf(t, map[string]string{"f": content})), Reference: "app"})
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	first := imp("1")
	b, _ := save(t, e, SaveRequest{Images: []string{"app"}})
	unnamed, _ := save(t, e, SaveRequest{Images: []string{first}})
	second := imp("2")
	if got := load(t, e, b, false); len(got) != 1 || got[0] != (Loaded{"app:latest", first, second}) {
		t.Errorf("%+v", got)
	}
	if got := load(t, e, b, true); len(got) != 1 || got[0] != (Loaded{"app:latest", first, ""}) {
		t.Errorf("%+v", got)
	}
	if got := load(t, newImageEngine(t), unnamed, true); len(got) != 1 || got[0] != (Loaded{"", first, ""}) {
		t.Errorf("%+v", got)
	}
}

// TestLoadHostile loads archives that are wrong where only who stores layers can see it: one line, and nothing is left.
func TestLoadHostile(t *testing.T) {
	e, p, _ := pulledEngine(t)
	flip := func(b, what []byte) []byte {
		i := bytes.Index(b, what)
		if i < 0 {
			t.Fatal("the layer is not there")
		}
		b = bytes.Clone(b)
		b[i+len(what)/2] ^= 1
		return b
	}
	oci, _ := save(t, e, SaveRequest{Images: []string{"app"}, Format: "oci-archive"})
	docker, _ := save(t, e, SaveRequest{Images: []string{"app"}})
	for what, b := range map[string][]byte{
		"a gzip layer is damaged":  flip(oci, p.packed[0]),
		"a zstd layer is damaged":  flip(oci, p.packed[1]),
		"a plain layer is damaged": flip(docker, p.tars[0]),
		"the last layer is":        flip(docker, p.tars[2]),
		"cut short":                docker[:len(docker)-1<<10-100],
		"cut in the middle":        docker[:len(docker)/2],
		"a tar of nothing":         make([]byte, 10<<10),
	} {
		for _, stream := range []bool{false, true} {
			for _, keep := range []string{config.KeepAuto, config.KeepNever} {
				other := newImageEngine(t)
				other.cfg.KeepBlobs = keep
				_, err := tryLoad(t, other, b, stream)
				if err == nil || strings.Contains(err.Error(), "\n") || !strings.HasPrefix(err.Error(), "load ") {
					t.Errorf("%s, stream %t: %v", what, stream, err)
				}
				wantEmpty(t, other, "layers", "blobs/sha256", "images", "downloads", "staging", "leases", "trash")
			}
		}
	}
	for _, stream := range [][]byte{gzipped(t, docker)[:1000], nil, []byte("BZh91AY&SY junk")} {
		if _, err := tryLoad(t, newImageEngine(t), stream, true); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%.8q: %v", stream, err)
		}
	}
}

// TestLoadUnused loads a stream with layers that no image has: they do not stay.
func TestLoadUnused(t *testing.T) {
	e := newImageEngine(t)
	if _, err := e.Import(bg, ImportRequest{Source: "-", Stdin: bytes.NewReader(tarOf(t, map[string]string{"f": "x"})), Reference: "app"}); err != nil {
		t.Fatal(err)
	}
	b, _ := save(t, e, SaveRequest{Images: []string{"app"}})
	extra := tarOf(t, map[string]string{"junk.tar": string(tarOf(t, map[string]string{"a": "a"})), "junk.tar.gz": string(gzipped(t, []byte("no tar")))})
	b = append(extra[:len(extra)-1024], b...) // without its end
	other := newImageEngine(t)
	load(t, other, b, true)
	if n := len(entries(t, other, "layers")); n != 1 {
		t.Errorf("%d layers", n)
	}
	wantEmpty(t, other, "downloads", "staging", "leases")
}

// TestSaveHoldsLayers removes an image while it is saved.
func TestSaveHoldsLayers(t *testing.T) {
	e, _, _ := pulledEngine(t)
	want, _ := save(t, e, SaveRequest{Images: []string{"app"}})
	var got bytes.Buffer
	removed := false
	w := writerFunc(func(b []byte) (int, error) {
		if !removed {
			removed = true
			if _, err := e.RemoveImage(bg, "app", RemoveImageRequest{}); err != nil {
				t.Error(err)
			}
		}
		return got.Write(b)
	})
	if _, err := e.Save(bg, SaveRequest{Images: []string{"app"}, Output: w}); err != nil || !bytes.Equal(got.Bytes(), want) {
		t.Errorf("%d bytes of %d, %v", got.Len(), len(want), err)
	}
	if collect.Pending(e.root) {
		t.Error("a sweep is pending: the lease is an open one")
	}
	// A context that ends ends the save.
	e, _, _ = pulledEngine(t)
	ctx, cancel := context.WithCancel(bg)
	w = func(b []byte) (int, error) { cancel(); return len(b), nil }
	if _, err := e.Save(ctx, SaveRequest{Images: []string{"app"}, Output: w}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// TestSaveDiskFull says of which disk an archive finds no room on.
func TestSaveDiskFull(t *testing.T) {
	e, _, _ := pulledEngine(t)
	dir := t.TempDir()
	w := writerFunc(func([]byte) (int, error) { return 0, &os.PathError{Op: "write", Path: dir, Err: syscall.ENOSPC} })
	_, err := e.Save(bg, SaveRequest{Images: []string{"app"}, Output: w})
	if !errors.Is(err, syscall.ENOSPC) || !strings.HasSuffix(e.Hint(err), "are free there") {
		t.Errorf("%v (%s)", err, e.Hint(err))
	}
	inside := &os.PathError{Op: "write", Path: e.root.Path("staging", "x"), Err: syscall.ENOSPC}
	if !strings.Contains(e.Hint(inside), "system prune") {
		t.Errorf("%s", e.Hint(inside))
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }
