package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"conex/internal/blobs"
	"conex/internal/disk"
	"conex/internal/ocispec"
)

func open(t testing.TB) (*Store, *blobs.Store, *disk.Root) {
	t.Helper()
	root, err := disk.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	bs := blobs.Open(root)
	return Open(root, bs, nil), bs, root
}

// rawConfig makes a config that differs by n, created n minutes after a fixed time.
func rawConfig(t testing.TB, n int) []byte {
	t.Helper()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).Add(time.Duration(n) * time.Minute)
	c := ocispec.Image{}
	c.Created, c.Architecture, c.OS = &at, "amd64", "linux"
	c.Config.Cmd = []string{"/bin/true", fmt.Sprint(n)}
	c.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	c.RootFS.Type = "layers"
	for i := range 8 {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, ocispec.FromBytes([]byte{byte(i), byte(n)}))
		c.History = append(c.History, ocispec.History{Created: &at, CreatedBy: "RUN /bin/sh -c something of a usual length && something else"})
	}
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func add(t testing.TB, s *Store, n int, tags ...string) Image {
	t.Helper()
	img, err := s.Add(context.Background(), rawConfig(t, n), "", "")
	if err != nil {
		t.Fatal(err)
	}
	for _, tag := range tags {
		if err := s.Tag(img.ID, ref(t, tag)); err != nil {
			t.Fatal(err)
		}
	}
	return img
}

func ref(t testing.TB, s string) Reference {
	t.Helper()
	r, err := ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestTagMoves(t *testing.T) {
	s, _, root := open(t)
	a := add(t, s, 1, "web", "localhost:5000/team/web:v1")
	b := add(t, s, 2, "web")
	got, err := s.Resolve("web")
	if err != nil || got.ID != b.ID || !slices.Equal(got.RepoTags, []string{"web:latest"}) || got.LastTagged.IsZero() {
		t.Fatalf("web: %+v, %v", got, err)
	}
	got, err = s.Resolve("localhost:5000/team/web:v1")
	if err != nil || got.ID != a.ID || !slices.Equal(got.RepoTags, []string{"localhost:5000/team/web:v1"}) {
		t.Fatalf("v1: %+v, %v", got, err)
	}
	if len(got.Layers()) != 8 || got.Config.Config.Cmd[1] != "1" {
		t.Fatalf("config: %+v", got.Config)
	}
	// One file per tag, named so that ls tells what is there.
	if _, err := os.Stat(root.Path("images", "localhost:5000%2Fteam%2Fweb:v1.json")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Untag(ref(t, "localhost:5000/team/web:v1")); err != nil {
		t.Fatal(err)
	}
	list, err := s.List()
	if err != nil || len(list) != 2 || list[0].ID != b.ID || list[1].ID != a.ID || list[1].RepoTags != nil {
		t.Fatalf("the untagged image must stay as dangling: %+v, %v", list, err)
	}
	refs, err := s.References()
	if err != nil || len(refs) != 1 || refs[0].Reference.Familiar() != "web:latest" || refs[0].ID != b.ID {
		t.Fatalf("references: %+v, %v", refs, err)
	}
}

func TestNothingWrittenWhenNothingChanges(t *testing.T) {
	s, _, root := open(t)
	img := add(t, s, 1, "a")
	stamp := func() (m []string) {
		err := filepath.WalkDir(root.Path(), func(p string, d os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			fi, err := d.Info()
			if err == nil && !d.IsDir() {
				m = append(m, fmt.Sprint(p, fi.ModTime()))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	before := stamp()
	if again := add(t, s, 1, "a"); again.ID != img.ID {
		t.Fatalf("again: %s", again.ID)
	}
	if again, err := s.Get(img.ID); err != nil || !slices.Equal(again.RepoTags, []string{"a:latest"}) {
		t.Fatalf("again: %v, %v", again.RepoTags, err)
	}
	if after := stamp(); !slices.Equal(before, after) {
		t.Fatalf("files changed:\n%v\n%v", before, after)
	}
}

func TestResolve(t *testing.T) {
	s, _, _ := open(t)
	img := add(t, s, 1, "web")
	hexa := strings.TrimPrefix(string(img.ID), "sha256:")
	man := ocispec.FromBytes([]byte("manifest"))
	if _, err := s.Add(context.Background(), img.RawConfig, man, "docker.io/library/web@"+string(man)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"web", "web:latest", "docker.io/library/web", hexa, "sha256:" + hexa, hexa[:12], "sha256:" + hexa[:7], hexa[:1],
		"web@" + string(man), "web:whatever@" + string(man)} {
		if got, err := s.Find(name); err != nil || got.ID != img.ID || len(got.Layers()) != 8 || got.RepoTags != nil {
			t.Errorf("find %s: %+v, %v", name, got, err)
		}
		got, err := s.Resolve(name)
		if err != nil || got.ID != img.ID || got.Manifest != man || !slices.Equal(got.RepoDigests, []string{"web@" + string(man)}) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	// A name wins over a short id that reads the same.
	other := add(t, s, 2, hexa[:12])
	if got, err := s.Resolve(hexa[:12]); err != nil || got.ID != other.ID {
		t.Errorf("name against id: %v, %v", got.ID, err)
	}
	for name, want := range map[string]string{
		"nope": "No such image: nope:latest", "web:2": "No such image: web:2", "a/b/c": "No such image: a/b/c:latest",
		"sha256:" + hex64: "No such image: sha256:" + hex64, "feedfacecafe": "No such image: feedfacecafe:latest",
		"web@sha256:" + hex64: "No such image: web@sha256:" + hex64,
	} {
		_, err := s.Resolve(name)
		if !errors.Is(err, ErrNotFound) || err.Error() != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Resolve("Web"); !errors.Is(err, ErrReference) {
		t.Errorf("Web: %v", err)
	}
}

func TestAmbiguous(t *testing.T) {
	s, _, _ := open(t)
	seen := map[byte]bool{}
	for n := 0; ; n++ { // 17 images at most until two share their first digit
		c := add(t, s, n).ID[len("sha256:")]
		if seen[c] {
			if _, err := s.Resolve(string(c)); !errors.Is(err, ErrAmbiguous) {
				t.Fatalf("prefix %c: %v", c, err)
			}
			return
		}
		seen[c] = true
	}
}

func TestDelete(t *testing.T) {
	s, bs, _ := open(t)
	img := add(t, s, 1, "a", "b:2")
	keep := add(t, s, 2, "c")
	if err := s.Delete(img.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(img.ID); !errors.Is(err, ErrNotFound) {
		t.Fatalf("again: %v", err)
	}
	list, err := s.List()
	if err != nil || len(list) != 1 || list[0].ID != keep.ID {
		t.Fatalf("%+v, %v", list, err)
	}
	if refs, err := s.References(); err != nil || len(refs) != 1 {
		t.Fatalf("%+v, %v", refs, err)
	}
	if err := s.Tag(img.ID, ref(t, "x")); !errors.Is(err, ErrNotFound) {
		t.Fatalf("tag of a deleted image: %v", err)
	}
	if !bs.Has(img.ID) {
		t.Fatal("Delete took the config, which is collect's to take")
	}
}

func TestUntagDigest(t *testing.T) {
	s, _, _ := open(t)
	man := ocispec.FromBytes([]byte("m"))
	img, err := s.Add(context.Background(), rawConfig(t, 1), man, "web@"+string(man))
	if err != nil {
		t.Fatal(err)
	}
	id, err := s.Untag(ref(t, "web@"+string(man)))
	if err != nil || id != img.ID {
		t.Fatal(id, err)
	}
	got, err := s.Resolve(string(img.ID))
	if err != nil || got.RepoDigests != nil {
		t.Fatalf("%+v, %v", got, err)
	}
}

func TestRefusals(t *testing.T) {
	s, bs, _ := open(t)
	for name, raw := range map[string]string{
		"not json":     "{",
		"evil diffID":  `{"rootfs":{"type":"layers","diff_ids":["sha256:../../../../etc/passwd"]}}`,
		"short diffID": `{"rootfs":{"type":"layers","diff_ids":["sha256:12"]}}`,
	} {
		if _, err := s.Add(context.Background(), []byte(raw), "", ""); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if left, err := bs.List(); err != nil || len(left) != 0 {
		t.Errorf("blobs left: %v, %v", left, err)
	}
	img := add(t, s, 1)
	if err := s.Tag(img.ID, ref(t, "a@sha256:"+hex64)); err == nil {
		t.Error("tag with a digest accepted")
	}
}

func TestDamagedConfigIsNoticed(t *testing.T) {
	s, _, root := open(t)
	img := add(t, s, 1, "a")
	p := root.Path("blobs", "sha256", strings.TrimPrefix(string(img.ID), "sha256:"))
	damaged := strings.Replace(string(img.RawConfig), "/bin/true", "/bin/evil", 1)
	if err := os.WriteFile(p, []byte(damaged), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := s.Resolve("a")
	if !errors.Is(err, blobs.ErrMismatch) || !errors.Is(err, ErrDamaged) || got.ID != img.ID || !slices.Equal(got.RepoTags, []string{"a:latest"}) || got.RawConfig != nil {
		t.Fatalf("got %+v, %v", got, err)
	}
	other := add(t, s, 2, "b")
	if list, err := s.List(); !errors.Is(err, ErrDamaged) || len(list) != 1 || list[0].ID != other.ID {
		t.Errorf("list beside a damaged one: %d, %v", len(list), err)
	}
	add(t, s, 1) // adding it again heals it
	if got, err := s.Resolve("a"); err != nil || got.ID != img.ID {
		t.Fatalf("after healing: %v", err)
	}
}

func TestDamagedTag(t *testing.T) {
	s, _, root := open(t)
	add(t, s, 1, "a")
	files, err := filepath.Glob(root.Path("images", "*.json"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	if err := os.WriteFile(files[0], []byte("junk"), 0o644); err != nil {
		t.Fatal(err)
	}
	const want = "the file of a tag is damaged: remove it"
	if _, err := s.List(); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), files[0]) {
		t.Errorf("list: %v", err)
	}
	if _, err := s.Resolve("a"); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("resolve: %v", err)
	}
}

func TestLongReference(t *testing.T) {
	s, _, _ := open(t)
	long := "registry.example.com/" + strings.Repeat("a", 250) + ":" + strings.Repeat("t", 127)
	a, b := add(t, s, 1, long+"1"), add(t, s, 2, long+"2")
	for name, want := range map[string]Image{long + "1": a, long + "2": b} {
		if got, err := s.Resolve(name); err != nil || got.ID != want.ID {
			t.Errorf("%v, %v", got.ID, err)
		}
	}
}

func TestConcurrent(t *testing.T) {
	s, _, _ := open(t)
	var wg sync.WaitGroup
	for n := range 8 {
		wg.Go(func() {
			for range 5 {
				img, err := s.Add(context.Background(), rawConfig(t, n%4), ocispec.FromBytes([]byte{byte(n)}), fmt.Sprintf("r%d@sha256:%s", n, hex64))
				if err == nil {
					err = s.Tag(img.ID, Reference{domain: "x.io", path: "p", tag: fmt.Sprint(n)})
				}
				if err == nil {
					_, err = s.List()
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	list, err := s.List()
	if err != nil || len(list) != 4 {
		t.Fatalf("%d images, %v", len(list), err)
	}
	for _, img := range list {
		if len(img.RepoTags) != 2 || len(img.RepoDigests) != 2 {
			t.Errorf("an update was lost: %v %v", img.RepoTags, img.RepoDigests)
		}
	}
}

func BenchmarkList100(b *testing.B) {
	s, _, _ := open(b)
	for n := range 100 {
		add(b, s, n, fmt.Sprintf("img%d", n))
	}
	for b.Loop() {
		if l, err := s.List(); err != nil || len(l) != 100 {
			b.Fatal(len(l), err)
		}
	}
}

func BenchmarkAddAndTag(b *testing.B) {
	s, _, _ := open(b)
	for n := 0; b.Loop(); n++ {
		add(b, s, n, "x")
	}
}

func BenchmarkFindOneOf100(b *testing.B) {
	s, _, _ := open(b)
	for n := range 100 {
		add(b, s, n, fmt.Sprintf("img%d", n))
	}
	for b.Loop() {
		if _, err := s.Find("img50"); err != nil {
			b.Fatal(err)
		}
	}
}
