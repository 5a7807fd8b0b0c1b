package archive

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"conex/internal/image"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// rawHeader is one tar block, checksum included, for what archive/tar refuses to write.
func rawHeader(name string, kind byte, size string) []byte {
	var b [512]byte
	copy(b[0:100], name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:136], size)
	copy(b[136:], "00000000000\x00")
	b[156] = kind
	copy(b[257:], "ustar\x0000")
	if kind == 'S' {
		copy(b[257:], "ustar  \x00") // GNU's
	}
	copy(b[148:], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b[:]
}

// hostileArchives are archives that are refused, with a part of the one line that says why.
func hostileArchives(t testing.TB) map[string]struct {
	b    []byte
	want string
} {
	base := layerOf(t, "a", "base")
	config := configOf(t, "amd64", base)
	id, layer := ocispec.FromBytes(config), ocispec.FromBytes(base)
	mani, err := MakeManifest(config, []Blob{blobOf(base, ocispec.MediaTypeImageLayer)})
	if err != nil {
		t.Fatal(err)
	}
	desc := func(mediaType string, b []byte) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: mediaType, Digest: ocispec.FromBytes(b), Size: int64(len(b))}
	}
	index := func(ds ...ocispec.Descriptor) []byte { return marshal(t, ocispec.Index{Manifests: ds}) }
	blob := func(b []byte) member { return member{name: blobDir + ocispec.FromBytes(b).Encoded(), content: b} }
	oci := func(top []byte, members ...member) []byte {
		return pack(t, append([]member{{name: ociList, content: top}}, members...)...)
	}
	docker := func(list string, members ...member) []byte {
		return pack(t, append([]member{{name: dockerList, content: []byte(list)}}, members...)...)
	}
	entry := func(conf string, layers ...string) string {
		return string(marshal(t, []dockerEntry{{Config: conf, Layers: layers}}))
	}
	manifest := desc(ocispec.MediaTypeImageManifest, mani)
	longer := manifest
	longer.Size++
	many := make([]string, 100_000)
	for i := range many {
		many[i] = "l/layer.tar"
	}
	manyDescs := ocispec.Manifest{Config: desc(ocispec.MediaTypeImageConfig, config)}
	for range MaxLayers + 1 {
		manyDescs.Layers = append(manyDescs.Layers, desc(ocispec.MediaTypeImageLayer, base))
	}
	manyRaw := marshal(t, manyDescs)
	encrypted := marshal(t, ocispec.Manifest{Config: desc(ocispec.MediaTypeImageConfig, config), Layers: []ocispec.Descriptor{desc(ocispec.MediaTypeImageLayer+"+encrypted", base)}})
	wrongSize := marshal(t, ocispec.Manifest{Config: desc(ocispec.MediaTypeImageConfig, config), Layers: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer, Digest: layer, Size: 1}}})
	both := []byte(`{"manifests":[],"config":{},"layers":[]}`)
	nested := index(manifest)
	var chain []member
	for range maxDepth + 1 {
		chain = append(chain, blob(nested))
		nested = index(desc(ocispec.MediaTypeImageIndex, nested))
	}
	var wide []ocispec.Descriptor
	for i := range maxImages + 1 {
		d := manifest
		d.Digest = ocispec.FromBytes(fmt.Append(nil, i))
		wide = append(wide, d)
	}
	wideRaw := index(wide...)
	sparse := append(rawHeader("manifest.json", 'S', "00000000000\x00"), make([]byte, 1024)...)
	whole := oci(index(manifest), blob(mani), blob(config), blob(base))
	cyclic := member{name: blobDir + layer.Encoded(), link: layer.Encoded()}
	cases := map[string]struct {
		b    []byte
		want string
	}{
		"nothing":                         {nil, "the archive is empty"},
		"an empty tar":                    {make([]byte, 1024), "the archive is empty"},
		"no tar":                          {bytes.Repeat([]byte("no tar "), 1000), "this is no tar"},
		"a layer":                         {base, "neither manifest.json nor index.json"},
		"Docker's before 1.10":            {pack(t, member{name: "repositories", content: []byte("{}")}), "Docker before 1.10"},
		"cut short":                       {whole[:len(whole)-2048], "cut short"},
		"damaged":                         {append(bytes.Clone(whole[:512*3]), bytes.Repeat([]byte("x"), 4096)...), "damaged after its entry number"},
		"absolute path":                   {docker("[]", member{name: "/etc/passwd"}), `"/etc/passwd" leads out of the archive`},
		"parent folder":                   {docker("[]", member{name: "a/../../x"}), `"a/../../x" leads out of the archive`},
		"link out":                        {docker("[]", member{name: "a/b", link: "../../x"}), "leads out of the archive"},
		"absolute link":                   {docker("[]", member{name: "a/b", link: "/etc/passwd"}), "leads out of the archive"},
		"hard link out":                   {docker("[]", member{name: "a/b", link: "../x", hard: true}), "leads out of the archive"},
		"link to itself":                  {docker(entry("c"), member{name: "c", link: "c"}), "more than 8 others"},
		"layer of itself":                 {oci(index(manifest), blob(mani), blob(config), cyclic), "more than 8 others"},
		"list twice":                      {docker("[]", member{name: "./manifest.json", content: []byte("[]")}), "manifest.json twice"},
		"index twice":                     {oci(index(manifest), member{name: ociList, content: index()}), "index.json twice"},
		"negative size":                   {append(rawHeader("manifest.json", '0', "-0000000001\x00"), make([]byte, 1024)...), "this is no tar"},
		"huge size":                       {append(rawHeader("manifest.json", '0', "77777777777\x00"), make([]byte, 1024)...), "cut short"},
		"huger size":                      {append(rawHeader("x", '0', "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff"), make([]byte, 1024)...), "cut short"},
		"sparse list":                     {sparse, "stored without its holes"},
		"a folder as list":                {docker(entry("d/x"), member{name: "d/"}), `no "d/x"`},
		"list is no JSON":                 {docker("[{"), "manifest.json is damaged"},
		"list is a number":                {docker("1"), "manifest.json is damaged"},
		"list is a manifest of something": {docker(`{"config":{"mediaType":"x"}}`), "no list of images"},
		"list is empty":                   {docker("[]"), "holds no image"},
		"gigantic list":                   {docker(strings.Repeat(" ", MaxList+1)), " has 8388609 bytes"},
		"gigantic index":                  {oci(bytes.Repeat([]byte(" "), MaxList+1)), " has 8388609 bytes"},
		"list of objects":                 {docker("[" + strings.Repeat("{},", 2<<20) + "{}]"), "objects and lists, at most 100000"},
		"index of objects":                {oci([]byte(`{"manifests":[` + strings.Repeat("{},", 2<<20) + "{}]}")), "objects and lists, at most 100000"},
		"deep list":                       {docker(strings.Repeat("[", 50_000)), "manifest.json is damaged"},
		"no such config":                  {docker(entry("c.json")), `no "c.json"`},
		"config outside":                  {docker(entry("../c.json")), "leads out of the archive"},
		"config is none":                  {docker(entry("c"), member{name: "c", content: []byte("[]")}), "decode config"},
		"config is a tar":                 {docker(entry("c"), member{name: "c", content: base}), ""},
		"config of others":                {docker(entry(strings.Repeat("0", 64)+".json"), member{name: strings.Repeat("0", 64) + ".json", content: config}), "has the content of " + string(id)},
		"gigantic config":                 {docker(entry("c"), member{name: "c", content: bytes.Repeat([]byte(" "), image.MaxConfig+1)}), "has 4194305 bytes, at most"},
		"no such layer":                   {docker(entry("c", "x/layer.tar"), member{name: "c", content: config}), `no "x/layer.tar"`},
		"layer outside":                   {docker(entry("c", "/x"), member{name: "c", content: config}), "leads out of the archive"},
		"too few layers":                  {docker(entry("c"), member{name: "c", content: config}), "layers length mismatch: expected 1, got 0"},
		"100,000 layers":                  {docker(entry("c", many...), member{name: "c", content: config}, member{name: "l/layer.tar", content: base}), "100000 layers, more than the 500"},
		"a bad tag":                       {docker(`[{"Config":"c","RepoTags":["A:b:c"]}]`, member{name: "c", content: config}), `invalid tag "A:b:c"`},
		"tag is a digest":                 {docker(`[{"Config":"c","RepoTags":["x@`+string(id)+`"]}]`, member{name: "c", content: config}), "invalid tag"},
		"index is empty":                  {oci(index()), "holds no image"},
		"index of artifacts":              {oci(index(desc("application/x", mani)), blob(mani)), "holds no image"},
		"no such manifest":                {oci(index(manifest)), "the archive has no \"blobs/sha256/"},
		"digest is no sha256":             {oci(index(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: "sha512:../../x"})), `"sha512:../../x" is not a sha256`},
		"manifest of others":              {oci(index(manifest), member{name: blobDir + manifest.Digest.Encoded(), content: bytes.Repeat([]byte("x"), len(mani))}), "has the content of"},
		"manifest is shorter":             {oci(index(longer), blob(mani)), "its descriptor says"},
		"manifest and index":              {oci(index(desc(ocispec.MediaTypeImageManifest, both)), blob(both)), "both an index and a manifest"},
		"index and manifest":              {oci(both), "both an index and a manifest"},
		"schema 1":                        {oci(index(desc(ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":1}`))), blob([]byte(`{"schemaVersion":1}`))), "schema 1"},
		"config is missing":               {oci(index(manifest), blob(mani), blob(base)), "no \"" + blobDir + id.Encoded()},
		"layer is missing":                {oci(index(manifest), blob(mani), blob(config)), "no \"" + blobDir + layer.Encoded()},
		"layer is longer":                 {oci(index(desc(ocispec.MediaTypeImageManifest, wrongSize)), blob(wrongSize), blob(config), blob(base)), "its manifest says 1"},
		"encrypted layer":                 {oci(index(desc(ocispec.MediaTypeImageManifest, encrypted)), blob(encrypted), blob(config), blob(base)), "can't be read"},
		"501 layers":                      {oci(index(desc(ocispec.MediaTypeImageManifest, manyRaw)), blob(manyRaw), blob(config), blob(base)), "501 layers, more than the 500"},
		"deep indexes":                    {oci(nested, append(chain, blob(mani), blob(config), blob(base))...), "lies in more than 3 others"},
		"10,001 manifests":                {oci(index(desc(ocispec.MediaTypeImageIndex, wideRaw)), blob(wideRaw)), "more than 10000 manifests"},
	}
	return cases
}

// TestHostile refuses archives in one line, as a file and as a stream, and in little memory.
func TestHostile(t *testing.T) {
	var before, after runtime.MemStats
	for what, c := range hostileArchives(t) {
		t.Run(what, func(t *testing.T) {
			runtime.ReadMemStats(&before)
			_, err := readFile(c.b)
			runtime.ReadMemStats(&after)
			refused(t, "file", err, c.want)
			if n := (after.TotalAlloc - before.TotalAlloc) >> 20; n > 100 {
				t.Errorf("took %d MB", n)
			}
			_, err = readStream(t, c.b)
			refused(t, "stream", err, c.want)
		})
	}
}

func refused(t *testing.T, how string, err error, want string) {
	t.Helper()
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 400 {
		t.Errorf("%s: got %v, want %s", how, err, want)
	}
}

// TestManyEntries refuses a tar of more entries than any image has.
func TestManyEntries(t *testing.T) {
	b := bytes.Repeat(rawHeader("x", '0', "00000000000\x00"), maxEntries+1)
	_, err := readFile(b)
	refused(t, "file", err, "more than 150000 entries")
	_, err = readStream(t, b)
	refused(t, "stream", err, "more than 150000 entries")
}

// TestSpoolBound refuses a stream of much that is no layer.
func TestSpoolBound(t *testing.T) {
	one := append(rawHeader("x", '0', fmt.Sprintf("%011o\x00", MaxList)), bytes.Repeat([]byte("x"), MaxList)...)
	r, w := io.Pipe()
	go func() { // ends when the reader is closed
		for {
			if _, err := w.Write(one); err != nil {
				return
			}
		}
	}()
	defer r.Close()
	spool, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer spool.Close()
	_, err = Stream(bg, r, spool, takeAll)
	refused(t, "stream", err, "more than 256 MiB beside its layers")
}

// TestSkippedBound refuses a stream that promises more of no use than anybody waits for.
func TestSkippedBound(t *testing.T) {
	spool, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer spool.Close()
	b := append(rawHeader("x", '0', "\x80\x00\x00\x00\x00\x00\x00\x40\x00\x00\x00\x00"), bytes.Repeat([]byte("x"), 1<<20)...)
	_, err = Stream(bg, bytes.NewReader(b), spool, takeAll)
	refused(t, "stream", err, "more than 16 GiB that is no layer")
}

// TestSourceError passes an error of the source on: it is not the archive's.
func TestSourceError(t *testing.T) {
	cable := errors.New("cable cut")
	whole := write(t, Docker, Set{Items: []Item{itemOf(t, "amd64", layerOf(t, "a", "base"))}})
	for _, n := range []int{0, 300, 600, len(whole) - 700, len(whole) - 1} {
		spool, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		_, err = Stream(bg, io.MultiReader(bytes.NewReader(whole[:n]), broken{cable}), spool, takeAll)
		if !errors.Is(err, cable) || errors.Is(err, ErrRefused) {
			t.Errorf("after %d bytes: %v", n, err)
		}
		spool.Close()
	}
}

type broken struct{ err error }

func (b broken) Read([]byte) (int, error) { return 0, b.err }

// TestHostileFolder has what no tar can: links that lead out for the kernel, fifos.
func TestHostileFolder(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(`[]`), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, make := range map[string]func(path string) error{
		"escapes":               func(p string) error { return os.Symlink(secret, p) },
		"is no file":            func(p string) error { return unix.Mkfifo(p, 0o600) },
		"manifest.json\" is no": func(p string) error { return os.Mkdir(p, 0o700) },
	} {
		dir := t.TempDir()
		if err := make(filepath.Join(dir, dockerList)); err != nil {
			t.Fatal(err)
		}
		if _, err := Dir(bg, dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	if _, err := Dir(bg, t.TempDir()); err == nil || !strings.Contains(err.Error(), "neither manifest.json nor index.json") {
		t.Errorf("an empty folder: %v", err)
	}
}

// FuzzRead reads anything, as a file and as a stream: both refuse it in one line, or both find the same images.
func FuzzRead(f *testing.F) {
	base := layerOf(f, "a", "base")
	f.Add(write(f, Docker, Set{References: []image.Reference{ref(f, "app")}, Items: []Item{itemOf(f, "amd64", base)}}))
	f.Add(write(f, OCI, Set{References: []image.Reference{ref(f, "app")}, Items: []Item{itemOf(f, "amd64", base, gzipped(f, base))}}))
	for _, c := range hostileArchives(f) {
		if len(c.b) < 64<<10 {
			f.Add(c.b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := readFile(b)
		stream, serr := readStream(t, b)
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("%q", err)
			}
			return
		}
		for _, img := range file.Images {
			if ocispec.FromBytes(img.RawConfig) != img.ID || len(img.Layers) > MaxLayers {
				t.Errorf("%+v", img)
			}
			for _, l := range img.Layers {
				r, err := l.Open()
				if err != nil {
					t.Fatal(err)
				}
				if n, err := io.Copy(io.Discard, r); err != nil || n > int64(len(b)) {
					t.Errorf("%d bytes, %v", n, err)
				}
			}
		}
		// A stream knows its layers' contents already, so it may refuse what a file does later.
		if serr == nil && (len(stream.Images) != len(file.Images) || len(stream.Tags) != len(file.Tags)) {
			t.Errorf("%d images and %d tags as a file, %d and %d as a stream", len(file.Images), len(file.Tags), len(stream.Images), len(stream.Tags))
		}
	})
}
