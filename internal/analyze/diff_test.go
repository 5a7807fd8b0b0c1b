package analyze

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"conex/internal/layers"
	"conex/internal/ocispec"
)

// shortDiff shows a difference in lines: a letter, the path and what differs.
func shortDiff(d *Difference) string {
	var out []string
	for _, c := range d.Config {
		out = append(out, fmt.Sprintf("%s: %v %v", c.Key, c.A, c.B))
	}
	for _, f := range d.Files {
		out = append(out, strings.TrimSpace(fmt.Sprintf("%c %s %s", f.Change.Letter(), f.Path, strings.Join(f.What, ","))))
	}
	return strings.Join(out, "\n")
}

func (s testStore) diff(t *testing.T, a, b string, opt DiffOptions) *Difference {
	t.Helper()
	d, err := s.Diff(context.Background(), s.resolve(t, a), s.resolve(t, b), opt)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDiff(t *testing.T) {
	eachDriver(t, func(t *testing.T, s testStore) {
		base := layerTar(t, "d etc", "f etc/passwd 10", "f etc/same 4000", "f etc/other 4000", "s link a", "d gone", "f gone/x 5", "f kind 3", "f zero 0", "f twice 50", "l hard twice")
		// The same files by other layers: only what a container would see counts.
		s.add(t, "a", base)
		s.add(t, "b", layerTar(t, "d new", "f new/y 1", "f etc/.wh.later 0"), layerTar(t, "D etc", "f etc/passwd 11", "f etc/same 4000", "F etc/other 4000", "s link b", "d kind", "f kind/z 1",
			"f zero 0", "f twice 50", "f hard 50"))
		want := "C etc mode\nC etc/other content\nC etc/passwd size\nD gone\nD gone/x\nC kind type\nA kind/z\nC link target\nA new\nA new/y"
		d := s.diff(t, "a", "b", DiffOptions{NoConfig: true})
		if got := shortDiff(d); got != want || d.Added != 3 || d.Changed != 5 || d.Removed != 2 || d.Shared != 0 {
			t.Errorf("%+v:\n%s\nwant:\n%s", d, got, want)
		}
		back := s.diff(t, "b", "a", DiffOptions{NoConfig: true})
		if back.Added != 2 || back.Removed != 3 || back.Changed != 5 {
			t.Errorf("the other way: %d %d %d", back.Added, back.Changed, back.Removed)
		}
		s.add(t, "c", base, layerTar(t, "f n 1"))
		if d := s.diff(t, "a", "c", DiffOptions{}); shortDiff(d) != "A n" || d.Shared != 1 {
			t.Errorf("with a shared base:\n%s", shortDiff(d))
		}
		if d := s.diff(t, "a", "a", DiffOptions{Times: true}); !d.Equal() {
			t.Errorf("with itself:\n%s", shortDiff(d))
		}
		var b bytes.Buffer
		if err := d.WriteJSON(&b); err != nil {
			t.Fatal(err)
		}
		var got struct {
			Schema, Added int
			Equal         bool
			Files         []struct {
				Path, Change string
				What         []string
				A, B         *struct {
					Type string
					Size int
				}
			}
		}
		if err := json.Unmarshal(b.Bytes(), &got); err != nil || got.Schema != 1 || got.Equal || got.Added != 3 || len(got.Files) != 10 || got.Files[2].A.Size != 10 || got.Files[8].A != nil {
			t.Errorf("%v: %s", err, b.Bytes())
		}
	})
}

// TestDiffOfRandom: an image differs from itself in other layers by nothing, and what differs one way differs the other.
func TestDiffOfRandom(t *testing.T) {
	s := newStore(t, layers.DriverDir)
	for seed := range uint64(10) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		a, b, c := randomLayer(t, rnd), randomLayer(t, rnd), randomLayer(t, rnd)
		x, y := fmt.Sprintf("x%d", seed), fmt.Sprintf("y%d", seed)
		s.add(t, x, a, b)
		s.add(t, y, a, b, c)
		one, two := s.diff(t, x, y, DiffOptions{}), s.diff(t, y, x, DiffOptions{})
		if one.Added != two.Removed || one.Removed != two.Added || one.Changed != two.Changed {
			t.Errorf("seed %d:\n%s\nand back:\n%s", seed, shortDiff(one), shortDiff(two))
		}
		// What the last layer did is what differs, but for what it stored again as it was.
		changed := changes(s.look(t, y), 2)
		for _, f := range one.Files {
			if line := fmt.Sprintf("%c %s", f.Change.Letter(), f.Path); !strings.Contains("\n"+changed+"\n", "\n"+line+"\n") {
				t.Errorf("seed %d: %q is no change of the layer:\n%s", seed, line, changed)
			}
		}
	}
}

func TestDiffConfigs(t *testing.T) {
	var a, b ocispec.Image
	for raw, c := range map[string]*ocispec.Image{
		`{"os":"linux","config":{"Env":["PATH=/bin","A=1","Z="],"Cmd":["sh"],"Labels":{"x":"1","y":"2"},"ExposedPorts":{"80/tcp":{}},"WorkingDir":"","OnBuild":[]}}`:                              &a,
		`{"os":"linux","variant":"v8","config":{"Env":["A=2","PATH=/bin","B=1"],"Cmd":["sh","-c"],"Labels":{"x":"1"},"ExposedPorts":{"443/tcp":{}},"User":"me","Healthcheck":{"Test":["NONE"]}}}`: &b,
	} {
		if err := json.Unmarshal([]byte(raw), c); err != nil {
			t.Fatal(err)
		}
	}
	got, err := diffConfigs(a, b, false)
	if err != nil {
		t.Fatal(err)
	}
	want := "Cmd: [sh] [sh -c]\nEnv.A: 1 2\nEnv.B: <nil> 1\nEnv.Z:  <nil>\nExposedPorts.443/tcp: <nil> true\nExposedPorts.80/tcp: true <nil>\n" +
		"Healthcheck: <nil> map[Test:[NONE]]\nLabels.y: 2 <nil>\nUser: <nil> me\nVariant: <nil> v8"
	if s := shortDiff(&Difference{Config: got}); s != want {
		t.Errorf("got:\n%s\nwant:\n%s", s, want)
	}
	if same, err := diffConfigs(a, a, true); err != nil || len(same) != 0 {
		t.Errorf("with itself: %v %v", same, err)
	}
}
