package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"conex/internal/compress"
	"conex/internal/image"
	"conex/internal/ocispec"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

var bg = context.Background()

// member is an entry of a tar.
type member struct {
	name    string
	content []byte
	link    string // a symbolic link; with hard one of the other kind
	hard    bool
}

func pack(t testing.TB, members ...member) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, m := range members {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: m.name, Mode: 0o644, Size: int64(len(m.content))}
		if m.link != "" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, m.link
			if m.hard {
				h.Typeflag = tar.TypeLink
			}
		}
		if strings.HasSuffix(m.name, "/") {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(m.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// layerOf is a layer with one file.
func layerOf(t testing.TB, file, content string) []byte {
	t.Helper()
	return pack(t, member{name: file, content: []byte(content)})
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// configOf is the config of an image with such layers.
func configOf(t testing.TB, arch string, layers ...[]byte) []byte {
	t.Helper()
	c := ocispec.Image{}
	c.OS, c.Architecture = "linux", arch
	c.RootFS.Type = "layers"
	for _, l := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, ocispec.FromBytes(l))
	}
	return marshal(t, c)
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ref(t testing.TB, s string) image.Reference {
	t.Helper()
	r, err := image.ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// blobOf is a layer as Write takes it.
func blobOf(content []byte, mediaType string) Blob {
	return Blob{Descriptor: ocispec.Descriptor{MediaType: mediaType, Digest: ocispec.FromBytes(content), Size: int64(len(content))},
		Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil }}
}

// itemOf is an image with uncompressed layers.
func itemOf(t testing.TB, arch string, layers ...[]byte) Item {
	t.Helper()
	it := Item{Config: configOf(t, arch, layers...), Platform: ocispec.Platform{OS: "linux", Architecture: arch}}
	for _, l := range layers {
		it.Layers = append(it.Layers, blobOf(l, ocispec.MediaTypeImageLayer))
		it.TopLayer = ocispec.FromBytes(l)
	}
	return it
}

func write(t testing.TB, f Format, sets ...Set) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := Write(bg, &buf, f, sets, nil); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// readFile reads an archive as a file.
func readFile(b []byte) (*Archive, error) { return File(bg, bytes.NewReader(b), int64(len(b))) }

// takeAll is what who stores layers does, without a store.
func takeAll(_ context.Context, _ string, r io.Reader, size int64) (*Taken, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	t := &Taken{Digest: ocispec.FromBytes(b), Size: size}
	z, _, err := compress.Reader(bytes.NewReader(b))
	if err == nil {
		defer z.Close()
		b, err = io.ReadAll(io.LimitReader(z, 64<<20))
	}
	t.DiffID, t.Err = ocispec.FromBytes(b), err
	return t, nil
}

// readStream reads an archive as it comes.
func readStream(t testing.TB, b []byte) (*Archive, error) {
	t.Helper()
	spool, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { spool.Close() })
	return Stream(bg, struct{ io.Reader }{bytes.NewReader(b)}, spool, takeAll)
}

// unpack writes an archive into a folder, as tar does.
func unpack(t testing.TB, b []byte) string {
	t.Helper()
	dir := t.TempDir()
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		p := filepath.Join(dir, h.Name)
		if h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(p, 0o755)
		} else {
			var content []byte
			if content, err = io.ReadAll(r); err == nil {
				err = errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, content, 0o644))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// describe says what an archive holds, contents of layers included.
func describe(t testing.TB, a *Archive) string {
	t.Helper()
	var b strings.Builder
	for _, img := range a.Images {
		fmt.Fprintf(&b, "image %.14s %s manifest %t:", img.ID, img.Platform.Architecture, img.Manifest != nil)
		for _, l := range img.Layers {
			d := l.DiffID
			if l.Taken == nil {
				r, err := l.Open()
				if err != nil {
					t.Fatal(err)
				}
				content, err := io.ReadAll(r)
				if err != nil {
					t.Fatal(err)
				}
				z, _, err := compress.Reader(bytes.NewReader(content))
				if err != nil {
					t.Fatal(err)
				}
				raw, err := io.ReadAll(z)
				if err != nil {
					t.Fatal(err)
				}
				d = ocispec.FromBytes(raw)
			}
			if d != l.DiffID {
				t.Errorf("%s has the content of %s, want %s", l.Name, d, l.DiffID)
			}
			fmt.Fprintf(&b, " %.14s", d)
		}
		b.WriteString("\n")
	}
	for _, tag := range a.Tags {
		fmt.Fprintf(&b, "tag %s %.14s", tag.Reference.Familiar(), tag.Index)
		for _, id := range tag.Images {
			fmt.Fprintf(&b, " %.14s", id)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// everyWay reads an archive as a file, a stream and a folder, and wants the same of all.
func everyWay(t *testing.T, b []byte) *Archive {
	t.Helper()
	file, err := readFile(b)
	if err != nil {
		t.Fatal(err)
	}
	want := describe(t, file)
	stream, err := readStream(t, b)
	if err != nil {
		t.Fatal(err)
	}
	if got := describe(t, stream); got != want {
		t.Errorf("as a stream\n%swant\n%s", got, want)
	}
	dir, err := Dir(bg, unpack(t, b))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if got := describe(t, dir); got != want {
		t.Errorf("as a folder\n%swant\n%s", got, want)
	}
	return file
}

// TestRoundTrip reads what Write wrote, and compares the bytes of two writes.
func TestRoundTrip(t *testing.T) {
	base, top, other := layerOf(t, "a", "base"), layerOf(t, "b", strings.Repeat("top", 1<<19)), layerOf(t, "c", "other")
	packed := gzipped(t, top)
	original := itemOf(t, "amd64", base, top)
	original.Layers = []Blob{blobOf(base, ocispec.MediaTypeImageLayer), blobOf(packed, ocispec.MediaTypeImageLayerGzip)}
	var err error
	if original.Manifest, err = MakeManifest(original.Config, original.Layers); err != nil {
		t.Fatal(err)
	}
	arm := itemOf(t, "arm64", base)
	amd := itemOf(t, "amd64", base)
	idx := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	idx.SchemaVersion = 2
	for _, it := range []Item{amd, arm} {
		m, err := MakeManifest(it.Config, it.Layers)
		if err != nil {
			t.Fatal(err)
		}
		d, err := Describe(m, "")
		if err != nil {
			t.Fatal(err)
		}
		d.Platform = &it.Platform
		idx.Manifests = append(idx.Manifests, d)
	}
	// One that is not here, as with most indexes of public images.
	idx.Manifests = append(idx.Manifests, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: ocispec.FromBytes(nil), Size: 9})
	sets := []Set{
		{References: []image.Reference{ref(t, "app"), ref(t, "example.com:5000/x/app:1")}, Items: []Item{itemOf(t, "amd64", base, top)}},
		{References: []image.Reference{ref(t, "pulled:1")}, Items: []Item{original}},
		{References: []image.Reference{ref(t, "multi")}, Index: marshal(t, idx), Items: []Item{amd, arm}},
		{Items: []Item{itemOf(t, "amd64", other)}},
		{References: []image.Reference{ref(t, "empty")}, Items: []Item{itemOf(t, "amd64")}},
	}
	for _, f := range []Format{OCI, Docker} {
		b := write(t, f, sets...)
		if !bytes.Equal(b, write(t, f, sets...)) {
			t.Errorf("%s: two writes differ", f)
		}
		if n := bytes.Count(b, base); n != 1 {
			t.Errorf("%s: a layer of three images is there %d times", f, n)
		}
		a := everyWay(t, b)
		var tags []string
		for _, tag := range a.Tags {
			tags = append(tags, tag.Reference.Familiar())
		}
		if want := []string{"app:latest", "example.com:5000/x/app:1", "pulled:1", "multi:latest", "empty:latest"}; !slices.Equal(tags, want) {
			t.Errorf("%s: tags %v, want %v", f, tags, want)
		}
		multi := a.Tags[3]
		if multi.Index != ocispec.FromBytes(sets[2].Index) || len(multi.Images) != 2 || !bytes.Equal(a.Indexes[multi.Index], sets[2].Index) {
			t.Errorf("%s: %+v", f, multi)
		}
		if len(a.Images) != 5 {
			t.Fatalf("%s: %d images", f, len(a.Images))
		}
		// The same config twice: what index.json names first counts. In a docker-archive its manifest says nothing.
		if img := a.Images[0]; !bytes.Equal(img.RawConfig, sets[0].Items[0].Config) || (img.Manifest != nil) != (f == OCI) {
			t.Errorf("%s: %+v", f, img)
		}
	}
	a := everyWay(t, write(t, Docker, sets[1]))
	if !bytes.Equal(a.Images[0].Manifest, original.Manifest) || a.Images[0].Layers[1].Blob.Digest != ocispec.FromBytes(packed) {
		t.Errorf("the manifest of compressed layers is lost: %+v", a.Images[0])
	}
}

// TestIndependentReaders gives archives to another implementation.
func TestIndependentReaders(t *testing.T) {
	base, top := layerOf(t, "a", "base"), layerOf(t, "b", "top")
	it := itemOf(t, "amd64", base, top)
	b := write(t, Docker, Set{References: []image.Reference{ref(t, "app"), ref(t, "app:1")}, Items: []Item{it}}, Set{References: []image.Reference{ref(t, "x")}, Items: []Item{itemOf(t, "amd64", base)}})
	tag, err := name.NewTag("app:1")
	if err != nil {
		t.Fatal(err)
	}
	check := func(img v1.Image, err error) {
		t.Helper()
		if err == nil {
			err = validate.Image(img, validate.Fast)
		}
		if err != nil {
			t.Fatal(err)
		}
		if raw, err := img.RawConfigFile(); err != nil || !bytes.Equal(raw, it.Config) {
			t.Errorf("config %s, %v", raw, err)
		}
	}
	check(tarball.Image(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }, &tag))
	l, err := layout.FromPath(unpack(t, b))
	if err != nil {
		t.Fatal(err)
	}
	idx, err := l.ImageIndex()
	if err == nil {
		err = validate.Index(idx, validate.Fast) // in a layout it takes every layer for gzip
	}
	if err != nil {
		t.Fatal(err)
	}
	m, err := idx.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, d := range m.Manifests {
		names = append(names, d.Annotations[annotationName]+" "+d.Annotations[annotationRef])
	}
	// A tag that two repositories have is no name by itself.
	want := []string{"docker.io/library/app:latest docker.io/library/app:latest", "docker.io/library/app:1 1", "docker.io/library/x:latest docker.io/library/x:latest"}
	if !slices.Equal(names, want) {
		t.Errorf("names %q", names)
	}
	check(l.Image(m.Manifests[0].Digest))

	packed := it
	packed.Layers = []Blob{blobOf(gzipped(t, base), ocispec.MediaTypeImageLayerGzip), blobOf(gzipped(t, top), ocispec.MediaTypeImageLayerGzip)}
	if l, err = layout.FromPath(unpack(t, write(t, OCI, Set{Items: []Item{packed}}))); err != nil {
		t.Fatal(err)
	}
	if idx, err = l.ImageIndex(); err == nil {
		err = validate.Index(idx)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestIndependentWriter reads what another implementation wrote.
func TestIndependentWriter(t *testing.T) {
	base := layerOf(t, "a", "base")
	b := write(t, Docker, Set{References: []image.Reference{ref(t, "app")}, Items: []Item{itemOf(t, "amd64", base)}})
	img, err := tarball.Image(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }, nil)
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag("example.com/app:2")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := tarball.Write(tag, img, &out); err != nil {
		t.Fatal(err)
	}
	a := everyWay(t, out.Bytes()) // its layers are compressed
	if a.Tags[0].Reference.String() != "example.com/app:2" || a.Images[0].Layers[0].DiffID != ocispec.FromBytes(base) {
		t.Errorf("%s", describe(t, a))
	}
}

// TestDocker1 reads the form of Docker's before 25: a folder for each layer, and links to those that occur again.
func TestDocker1(t *testing.T) {
	base, top := layerOf(t, "a", "base"), layerOf(t, "b", "top")
	config := configOf(t, "amd64", base, top, base)
	id := ocispec.FromBytes(config).Encoded()
	list := marshal(t, []dockerEntry{{Config: id + ".json", RepoTags: []string{"app:1"}, Layers: []string{"l1/layer.tar", "l2/layer.tar", "l3/layer.tar"}}})
	for _, link := range []member{{name: "l3/layer.tar", link: "../l1/layer.tar"}, {name: "l3/layer.tar", link: "l1/layer.tar", hard: true}} {
		b := pack(t,
			member{name: id + ".json", content: config},
			member{name: "l1/"}, member{name: "l1/VERSION", content: []byte("1.0")}, member{name: "l1/json", content: []byte("{}")}, member{name: "l1/layer.tar", content: base},
			member{name: "l2/"}, member{name: "./l2/layer.tar", content: gzipped(t, top)}, member{name: "l3/"}, link,
			member{name: "manifest.json", content: list}, member{name: "repositories", content: []byte("{}")})
		file, err := readFile(b)
		if err != nil {
			t.Fatal(err)
		}
		stream, err := readStream(t, b)
		if err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf("image %.14s amd64 manifest false: %.14s %.14s %.14s\ntag app:1  %.14s\n", "sha256:"+id,
			ocispec.FromBytes(base), ocispec.FromBytes(top), ocispec.FromBytes(base), "sha256:"+id)
		if f, s := describe(t, file), describe(t, stream); f != want || s != want {
			t.Errorf("file\n%sstream\n%swant\n%s", f, s, want)
		}
	}
}

// TestNames has what descriptors of index.json may be called by.
func TestNames(t *testing.T) {
	for _, c := range []struct{ name, ref, want string }{
		{"docker.io/library/a:1", "1", "a:1"},
		{"", "docker.io/library/b:2", "b:2"},
		{"", "c:3", "c:3"},
		{"", "localhost/d", "localhost/d:latest"},
		{"", "latest", ""},
		{"", "", ""},
		{"a b", "latest", ""},
		{"", "x@sha256:" + strings.Repeat("0", 64), ""},
	} {
		got := ""
		if refs := referencesIn(map[string]string{annotationName: c.name, annotationRef: c.ref}); len(refs) > 0 {
			got = refs[0].Familiar()
		}
		if got != c.want {
			t.Errorf("%q and %q name %q, want %q", c.name, c.ref, got, c.want)
		}
	}
}

// TestDamagedLayer writes layers that are not what their descriptors say.
func TestDamagedLayer(t *testing.T) {
	for _, c := range []struct {
		content string
		want    string
	}{{"short", "5 bytes of 2048"}, {strings.Repeat("x", 2048), "its content is sha256:"}} {
		it := itemOf(t, "amd64", layerOf(t, "a", "base"))
		it.Layers[0].Open = func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(c.content)), nil }
		err := Write(bg, io.Discard, Docker, []Set{{Items: []Item{it}}}, nil)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "pull or build") {
			t.Errorf("got %v, want %s", err, c.want)
		}
	}
}
