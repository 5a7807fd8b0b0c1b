package analyze

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
)

// drawn is a tree in lines: sizes of the layers and the images that end there.
func drawn(nodes []*TreeNode, lead string) string {
	var b strings.Builder
	for _, n := range nodes {
		fmt.Fprintf(&b, "%s", lead)
		for _, l := range n.Layers {
			fmt.Fprintf(&b, "%d/%d ", l.Size, l.SharedBy)
		}
		fmt.Fprintf(&b, "= %d", n.Total)
		for _, i := range n.Images {
			fmt.Fprintf(&b, " %s", strings.Join(i.Tags, ","))
		}
		b.WriteString("\n" + drawn(n.Children, lead+"  "))
	}
	return b.String()
}

func TestTree(t *testing.T) {
	s := newStore(t, layers.DriverDir)
	tree := func(name, want string) *Tree {
		t.Helper()
		var only *image.Image
		if name != "" {
			img := s.resolve(t, name)
			only = &img
		}
		got, err := s.Tree(context.Background(), only)
		if err != nil {
			t.Fatal(err)
		}
		if d := drawn(got.Roots, ""); d != want {
			t.Errorf("tree of %q:\n%swant:\n%s", name, d, want)
		}
		return got
	}
	tree("", "")
	l := func(n int) []byte { return layerTar(t, fmt.Sprintf("f f%d %d", n, n)) }
	s.add(t, "base", l(100))
	s.add(t, "app", l(100), l(20), l(3))
	s.add(t, "app2", l(100), l(20), l(4), l(5))
	s.add(t, "long", l(100), l(7), l(8))
	s.add(t, "other", l(50), l(51), l(20))
	s.add(t, "scratch")
	got := tree("", "50/1 51/1 20/3 = 121 other:latest\n100/4 = 100 base:latest\n  20/3 = 120\n    4/1 5/1 = 129 app2:latest\n    3/1 = 123 app:latest\n  7/1 8/1 = 115 long:latest\n= 0 scratch:latest\n")
	if got.Images != 6 || got.Layers != 9 || got.Size != 100+20+3+4+5+7+8+50+51 || got.Unshared != 100+123+129+115+121 {
		t.Errorf("%+v", got)
	}
	tree("app2", "100/4 = 100 base:latest\n  20/3 = 120\n    4/1 = 124\n      5/1 = 129 app2:latest\n")
	tree("base", "100/4 = 100 base:latest\n")

	// A layer that is not here is said to be missing, and hides nothing else.
	img := s.resolve(t, "long")
	if err := os.RemoveAll(dirOf(s, img.Layers()[2])); err != nil {
		t.Fatal(err)
	}
	got = tree("long", "100/4 = 100 base:latest\n  7/1 = 107\n    0/1 = 107 long:latest\n")
	if last := got.Roots[0].Children[0].Children[0].Layers[0]; !last.Missing || last.Instruction != "RUN step 2" {
		t.Errorf("%+v", last)
	}
	// So is a damaged image.
	if err := os.WriteFile(s.dir+"/blobs/sha256/"+img.ID.Encoded(), bytes.Repeat([]byte("x"), 10), 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := s.Tree(context.Background(), nil)
	if err == nil || all == nil || all.Images != 5 {
		t.Errorf("with a damaged image: %+v, %v", all, err)
	}
}

// TestPlatforms: images of one tag are told apart by their platforms.
func TestPlatforms(t *testing.T) {
	s := newStore(t, layers.DriverDir)
	shared := layerTar(t, "f a 100")
	own := s.add(t, "app", shared, layerTar(t, "f b 1"))
	c := own.Config
	c.Architecture, c.Variant = "arm64", "v8"
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := s.Images.Add(context.Background(), raw, ocispec.FromBytes([]byte("manifest")), "")
	if err != nil {
		t.Fatal(err)
	}
	ref, err := image.ParseReference("app")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Images.TagIndex(ref, ocispec.FromBytes([]byte("index")), own.ID, foreign.ID); err != nil {
		t.Fatal(err)
	}
	img := s.look(t, "app")
	if l := img.Layers[0]; img.Platform != "linux/amd64" || fmt.Sprint(l.SharedWith) != "[app:latest (linux/arm64/v8)]" {
		t.Errorf("%s shared with %q", img.Platform, l.SharedWith)
	}
	tree, err := s.Tree(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := tree.Roots[0].Images; len(got) != 2 || got[0].Platform == got[1].Platform || got[0].Tags[0] != "app:latest" || got[1].Tags[0] != "app:latest" {
		t.Errorf("%+v", got)
	}
}
