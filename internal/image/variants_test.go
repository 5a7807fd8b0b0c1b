package image

import (
	"context"
	"encoding/json"
	"errors"
	"runtime"
	"slices"
	"testing"

	"conex/internal/ocispec"
)

// addFor adds an image of a platform.
func addFor(t *testing.T, s *Store, arch, repoDigest string) Image {
	t.Helper()
	c := ocispec.Image{}
	c.OS, c.Architecture = "linux", arch
	c.RootFS.Type = "layers"
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	img, err := s.Add(context.Background(), raw, ocispec.FromBytes([]byte("manifest of "+arch)), repoDigest)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestVariants(t *testing.T) {
	s, _, _ := open(t)
	index := ocispec.FromBytes([]byte("index"))
	byDigest := "app@" + string(index)
	other := "s390x"
	foreign, own := addFor(t, s, other, byDigest), addFor(t, s, runtime.GOARCH, byDigest)
	app := ref(t, "app")
	if err := s.TagIndex(app, index, foreign.ID); err != nil {
		t.Fatal(err)
	}
	if id, err := s.IDOf(app); err != nil || id != foreign.ID {
		t.Fatalf("the only platform: %v, %v", id, err)
	}
	if err := s.TagIndex(app, index, own.ID); err != nil {
		t.Fatal(err)
	}
	want := func(name string, ids ...ocispec.Digest) {
		t.Helper()
		imgs, gotIndex, err := s.Variants(name)
		var got []ocispec.Digest
		for _, i := range imgs {
			got = append(got, i.ID)
		}
		if err != nil || gotIndex != index || !slices.Equal(got, ids) {
			t.Fatalf("%s leads to %v of %v, %v; want %v", name, got, gotIndex, err, ids)
		}
	}
	want("app", own.ID, foreign.ID)
	want(byDigest, own.ID, foreign.ID)
	if id, err := s.IDOf(ref(t, byDigest)); err != nil || id != own.ID {
		t.Fatalf("by digest: %v, %v", id, err)
	}
	for _, c := range []struct {
		arch string
		id   ocispec.Digest
	}{{other, foreign.ID}, {runtime.GOARCH, own.ID}} {
		img, err := s.ResolvePlatform("app", ocispec.Platform{OS: "linux", Architecture: c.arch})
		if err != nil || img.ID != c.id || !slices.Equal(img.RepoTags, []string{"app:latest"}) {
			t.Fatalf("%s: %v %v, %v", c.arch, img.ID, img.RepoTags, err)
		}
	}
	_, err := s.ResolvePlatform("app", ocispec.Platform{OS: "linux", Architecture: "riscv64"})
	if !errors.Is(err, ErrNotFound) || err.Error() != "No such image: app:latest for platform linux/riscv64" {
		t.Fatalf("got %v", err)
	}
	if ds, err := s.Indexes(); err != nil || !slices.Equal(ds, []ocispec.Digest{index}) {
		t.Fatalf("indexes %v, %v", ds, err)
	}
	if refs, err := s.References(); err != nil || len(refs) != 1 || refs[0].ID != own.ID {
		t.Fatalf("references %v, %v", refs, err)
	}
	// This machine's image goes: the tag stays for the other one.
	if err := s.Delete(own.ID); err != nil {
		t.Fatal(err)
	}
	want("app", foreign.ID)
	// A new index takes the tag away from what the old one had.
	renewed := add(t, s, 1)
	index = ocispec.FromBytes([]byte("another index"))
	if err := s.TagIndex(app, index, renewed.ID); err != nil {
		t.Fatal(err)
	}
	want("app", renewed.ID)
	if img, err := s.Get(foreign.ID); err != nil || len(img.RepoTags) != 0 {
		t.Fatalf("%v, %v", img.RepoTags, err)
	}
	if err := s.Delete(renewed.ID); err != nil { // the last one takes the tag along
		t.Fatal(err)
	}
	if _, _, err := s.Variants("app"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("got %v", err)
	}
	if err := s.TagIndex(app, index, own.ID); !errors.Is(err, ErrNotFound) {
		t.Fatalf("a deleted image was tagged: %v", err)
	}
}
