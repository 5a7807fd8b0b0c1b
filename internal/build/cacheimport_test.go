package build

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"conex/internal/ocispec"
)

// writeOld puts the file a into the context, with the same time on every machine.
func writeOld(e *env) {
	e.t.Helper()
	e.write("a", "a")
	when := time.Unix(1700000000, 0)
	if err := os.Chtimes(filepath.Join(e.ctx, "a"), when, when); err != nil {
		e.t.Fatal(err)
	}
}

// exportCache builds on one machine and returns its cache.
func exportCache(t *testing.T, file string, o CacheOptions) (*env, *CacheConfig) {
	t.Helper()
	e := newEnv(t)
	writeOld(e)
	var c *CacheConfig
	_, err := e.build(file, func(r *Request) {
		e.tag()(r)
		export := r.Export
		r.Export = func(ctx context.Context, x *Export) error {
			var err error
			if c, err = x.Cache(ctx, o); err != nil {
				return err
			}
			return export(ctx, x)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return e, c
}

// serve makes a source of a cache, of which lie changes what is told.
func serve(t *testing.T, from, to *env, c *CacheConfig, lie func(m *ocispec.Manifest, c *CacheConfig)) CacheSource {
	t.Helper()
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	var told CacheConfig
	if err := json.Unmarshal(raw, &told); err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	m.Config.MediaType = CacheConfigType
	for _, l := range c.Layers {
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: l.DiffID, Size: 1})
	}
	if lie != nil {
		lie(&m, &told)
	}
	return CacheSource{Name: "there", Load: func(context.Context) ([]byte, []byte, error) {
		manifest, err := json.Marshal(m)
		if err != nil {
			return nil, nil, err
		}
		config, err := json.Marshal(told)
		return manifest, config, err
	}, Fetch: func(ctx context.Context, blob ocispec.Descriptor, id ocispec.Digest, _ string, _ func(int64, int64)) error {
		rc, _, err := from.b.Layers.OpenTar(blob.Digest)
		if err != nil {
			return err
		}
		defer rc.Close()
		_, err = to.b.Layers.Import(ctx, rc, id)
		return err
	}}
}

const travels = "FROM scratch AS one\nCOPY a /a\nFROM scratch\nCOPY --from=one /a /b\nCOPY a /c\n"

func TestCacheTravels(t *testing.T) {
	from, c := exportCache(t, travels, CacheOptions{Max: true})
	to := newEnv(t)
	writeOld(to)
	img, err := to.build(travels, func(r *Request) { r.CacheFrom = []CacheSource{serve(t, from, to, c, nil)} })
	if err != nil {
		t.Fatal(err)
	}
	for _, ev := range to.events {
		if ev.Kind == Done && (strings.Contains(ev.Name, "COPY")) {
			t.Errorf("%s ran", ev.Name)
		}
	}
	if infos, err := to.b.Layers.List(); err != nil || len(infos) != 2 {
		t.Errorf("%d layers were fetched (%v), want the image's 2", len(infos), err)
	}
	imported := 0
	for _, r := range c.Records {
		rec, ok, err := (&cache{root: to.root, layers: to.b.Layers}).get(r.Class, r.Key)
		if err != nil || ok && rec.Import != "there" {
			t.Errorf("record from %q, %v; want one from there", rec.Import, err)
		}
		if ok {
			imported++
		}
	}
	if imported != 2 {
		t.Errorf("%d records were taken over, want those of the 2 steps that were hit", imported)
	}
	again, err := to.build(travels)
	if err != nil || again.ID != img.ID {
		t.Errorf("the second build gave %s, %v, want %s", again.ID, err, img.ID)
	}
}

// Whatever a cache says: the build goes on, and gives what it gives without it, unless a record lies about what a step makes.
func TestHostileCache(t *testing.T) {
	from, c := exportCache(t, travels, CacheOptions{Max: true})
	want := newEnv(t)
	writeOld(want)
	clean, err := want.build(travels)
	if err != nil {
		t.Fatal(err)
	}
	other := ocispec.FromBytes([]byte("other"))
	for name, lie := range map[string]func(m *ocispec.Manifest, c *CacheConfig){
		"layers swapped":      func(m *ocispec.Manifest, _ *CacheConfig) { m.Layers[0], m.Layers[1] = m.Layers[1], m.Layers[0] },
		"layers not there":    func(m *ocispec.Manifest, _ *CacheConfig) { m.Layers[0].Digest, m.Layers[1].Digest = other, other },
		"fewer layers":        func(m *ocispec.Manifest, _ *CacheConfig) { m.Layers = m.Layers[1:] },
		"no sha256":           func(m *ocispec.Manifest, _ *CacheConfig) { m.Layers[0].Digest = "sha256:../../../../etc/passwd" },
		"negative size":       func(m *ocispec.Manifest, _ *CacheConfig) { m.Layers[0].Size = -1 },
		"unknown layer":       func(_ *ocispec.Manifest, c *CacheConfig) { c.Records[0].Layer = other },
		"key is a path":       func(_ *ocispec.Manifest, c *CacheConfig) { c.Records[0].Key = "../../../../" + strings.Repeat("a", 52) },
		"key in capitals":     func(_ *ocispec.Manifest, c *CacheConfig) { c.Records[0].Key = strings.Repeat("A", 64) },
		"unknown class":       func(_ *ocispec.Manifest, c *CacheConfig) { c.Records[0].Class = "../lock" },
		"time before 1970":    func(_ *ocispec.Manifest, c *CacheConfig) { c.Records[0].Created = time.Unix(-1e11, 0) },
		"newer version":       func(_ *ocispec.Manifest, c *CacheConfig) { c.Version = 99 },
		"other keys":          func(_ *ocispec.Manifest, c *CacheConfig) { c.Keys = "other" },
		"mount without layer": func(_ *ocispec.Manifest, c *CacheConfig) { c.Mounts = []CacheMount{{ID: "x", Layer: other}} },
		"BuildKit's":          func(m *ocispec.Manifest, _ *CacheConfig) { m.Config.MediaType = buildkitCacheType },
		"an index":            func(m *ocispec.Manifest, _ *CacheConfig) { m.MediaType = ocispec.MediaTypeImageIndex },
		"too many records":    func(_ *ocispec.Manifest, c *CacheConfig) { c.Records = make([]CacheRecord, maxCacheRecords+1) },
	} {
		t.Run(name, func(t *testing.T) {
			to := newEnv(t)
			writeOld(to)
			img, err := to.build(travels, func(r *Request) { r.CacheFrom = []CacheSource{serve(t, from, to, c, lie)} })
			if err != nil {
				t.Fatal(err)
			}
			if fmt.Sprint(img.Layers()) != fmt.Sprint(clean.Layers()) {
				t.Errorf("layers are %v, want %v", img.Layers(), clean.Layers())
			}
		})
	}
}

// A source that can't be read is told of once, and asked once.
func TestCacheSourceFails(t *testing.T) {
	e := newEnv(t)
	writeOld(e)
	asked := 0
	_, err := e.build(travels, func(r *Request) {
		r.CacheFrom = []CacheSource{{Name: "there", Load: func(context.Context) ([]byte, []byte, error) { asked++; return nil, nil, errors.New("down") }}}
	})
	if err != nil || asked != 1 {
		t.Fatalf("asked %d times, %v", asked, err)
	}
	told := 0
	for _, ev := range e.events {
		if ev.Kind == Failed && strings.Contains(ev.Name, "importing cache manifest from there") {
			told++
		}
	}
	if told != 1 {
		t.Errorf("told %d times that the cache is down", told)
	}
}

func FuzzDecodeCache(f *testing.F) {
	id := ocispec.FromBytes([]byte("layer"))
	m := ocispec.Manifest{Layers: []ocispec.Descriptor{{Digest: id, Size: 1}}}
	m.Config.MediaType = CacheConfigType
	manifest, err := json.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	config, err := json.Marshal(CacheConfig{
		Version: cacheVersion, Keys: version, Layers: []CacheLayer{{DiffID: id, Recipe: "gzip:5"}}, Mounts: []CacheMount{{ID: "m", Layer: id}},
		Records: []CacheRecord{{Class: byContent, Key: id.Encoded(), Kind: "run\x1b[2J", Layer: id}},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(manifest, config)
	m.Config.MediaType = ocispec.MediaTypeImageConfig
	manifest, err = json.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(manifest, []byte(`{"rootfs":{"diff_ids":["`+id+`"]},"conex.buildcache.v1":{"version":1,"keys":"3","records":[]}}`))
	f.Add([]byte(`{"mediaType":"application/vnd.oci.image.index.v1+json"}`), []byte(`{}`))
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		c, err := decodeCache(manifest, config)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\n\x1b") {
				t.Errorf("an error of several lines, or with control characters: %q", err)
			}
			return
		}
		for k, r := range c.records {
			if k != r.Class+"/"+r.Key || len(r.Key) != 64 || strings.Trim(r.Key, "0123456789abcdef") != "" || r.Class != byDefinition && r.Class != byContent {
				t.Errorf("record %q at %q", r.Class+"/"+r.Key, k)
			}
			if r.Layer != "" && ocispec.Validate(c.blobs[r.Layer].Digest) != nil {
				t.Errorf("layer %q has no blob", r.Layer)
			}
			if strings.ContainsAny(r.Kind, "\n\x1b") {
				t.Errorf("kind %q", r.Kind)
			}
			if _, err := json.Marshal(Record{Created: r.Created}); err != nil {
				t.Errorf("it can't be stored: %v", err)
			}
		}
	})
}
