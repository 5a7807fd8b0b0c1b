package explorer

import (
	"archive/tar"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"conex/internal/analyze"
	"conex/internal/layertar"
	"conex/internal/ocispec"
)

var update = flag.Bool("update", false, "write the golden screens anew")

// layer is a layer of a test: its instruction, the images that have it too, and its files: "f name size", "d folder", "D folder" for its owner
// alone, "l name target" a hard link, "s name target" a symbolic one.
type layer struct {
	by     string
	shared []string
	files  []string
}

func newImage(t testing.TB, name string, list ...layer) *analyze.Image {
	t.Helper()
	var ls []analyze.Layer
	var trees []*layertar.Tree
	for _, l := range list {
		tree := layertar.NewTree()
		for _, line := range l.files {
			kind, rest, _ := strings.Cut(line, " ")
			i := strings.LastIndexByte(rest, ' ')
			h := tar.Header{Name: rest, Mode: 0o644, ModTime: time.Unix(1_700_000_000, 0)}
			switch kind {
			case "d":
				h.Typeflag, h.Mode = tar.TypeDir, 0o755
			case "D":
				h.Typeflag, h.Mode = tar.TypeDir, 0o700
			case "f":
				h.Typeflag, h.Name = tar.TypeReg, rest[:i]
				if _, err := fmt.Sscan(rest[i+1:], &h.Size); err != nil {
					t.Fatal(err)
				}
			case "l":
				h.Typeflag, h.Name, h.Linkname = tar.TypeLink, rest[:i], rest[i+1:]
			case "s":
				h.Typeflag, h.Name, h.Linkname = tar.TypeSymlink, rest[:i], rest[i+1:]
			}
			if _, err := tree.Add(&h, 0); err != nil {
				t.Fatal(err)
			}
		}
		tree.Finish()
		trees = append(trees, tree)
		ls = append(ls, analyze.Layer{DiffID: ocispec.FromBytes([]byte(l.by)), CreatedBy: l.by, SharedWith: l.shared})
	}
	img, err := analyze.New(analyze.Image{ID: ocispec.FromBytes([]byte(name)), Tags: []string{name}}, ls, trees)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func sample(t testing.TB) *analyze.Image {
	return newImage(t, "shop:1.2",
		layer{by: "Debian bookworm by mmdebstrap", shared: []string{"debian:latest", "nginx:latest"}, files: []string{
			"d bin", "f bin/busybox 700000", "l bin/sh bin/busybox", "d etc", "f etc/passwd 1200", "f etc/hostname 5", "s etc/mtab ../proc/self/mounts",
			"d usr", "d usr/share", "d usr/share/doc", "f usr/share/doc/readme 30000", "f usr/share/doc/copying 18000", "d tmp"}},
		layer{by: "RUN /bin/sh -c apt-get update && apt-get install -y --no-install-recommends nodejs npm && rm -rf /usr/share/doc # buildkit", files: []string{
			"f usr/share/.wh.doc 0", "f etc/passwd 1300", "d usr/bin", "f usr/bin/node 90000000", "d var", "d var/lib", "f var/lib/dpkg 400000"}},
		layer{by: "COPY . /srv # buildkit", files: []string{
			"d srv", "f srv/server.js 4200", "f srv/evil\x1b[2J\x1b]0;owned\anl\n\xff 1", "f srv/日本語の長い名前のファイルです.txt 77", "f srv/" + strings.Repeat("long", 40) + " 3", "f srv/\u202egpj.exe 1",
			"f var/lib/dpkg 401000"}},
		layer{by: "", files: []string{"f etc/.wh.hostname 0", "D tmp"}})
}

// press sends keys, by the names that Update knows them by; other words are typed letter by letter.
func press(m *Model, keys ...string) (quit bool) {
	special := map[string]tea.Key{"tab": {Code: tea.KeyTab}, "enter": {Code: tea.KeyEnter}, "space": {Code: tea.KeySpace, Text: " "}, "esc": {Code: tea.KeyEscape}, "up": {Code: tea.KeyUp},
		"down": {Code: tea.KeyDown}, "left": {Code: tea.KeyLeft}, "right": {Code: tea.KeyRight}, "pgdown": {Code: tea.KeyPgDown}, "pgup": {Code: tea.KeyPgUp},
		"home": {Code: tea.KeyHome}, "end": {Code: tea.KeyEnd}, "backspace": {Code: tea.KeyBackspace}, "ctrl+c": {Code: 'c', Mod: tea.ModCtrl}, "ctrl+u": {Code: 'u', Mod: tea.ModCtrl}}
	for _, k := range keys {
		list := []tea.Key{}
		if s, ok := special[k]; ok {
			list = append(list, s)
		} else {
			for _, r := range k {
				list = append(list, tea.Key{Code: r, Text: string(r)})
			}
		}
		for _, key := range list {
			_, cmd := m.Update(tea.KeyPressMsg(key))
			if cmd != nil {
				_, q := cmd().(tea.QuitMsg)
				quit = quit || q
			}
		}
	}
	return quit
}

// TestScreens compares screens with those in testdata, without their colours: what matters must be there without them.
func TestScreens(t *testing.T) {
	for _, c := range []struct {
		name          string
		width, height int
		keys          []string
	}{
		{"start", 80, 24, nil},
		{"layer-1", 80, 24, []string{"up", "up"}},
		{"layer-1-alone", 80, 24, []string{"k", "k", "t", "tab", "down"}},
		{"base", 80, 24, []string{"g"}},
		{"unfolded", 80, 24, []string{"g", "tab", "e", "down", "down"}},
		{"folded", 80, 24, []string{"tab", "e", "E", "end"}},
		{"into-folder", 80, 24, []string{"[", "tab", "g", "j", "j", "right", "right", "right"}},
		{"hostile-names", 80, 24, []string{"[", "t", "l", "l", "l", "l"}},
		{"filter-removed", 80, 24, []string{"[", "[", "u", "a", "c"}},
		{"no-removed", 80, 24, []string{"d"}},
		{"search-typing", 80, 24, []string{"/", "NOD"}},
		{"search", 80, 24, []string{"g", "/", "DOC", "enter", "n"}},
		{"search-path", 80, 24, []string{"g", "/", "share/doc/c", "enter"}},
		{"search-nothing", 80, 24, []string{"/", "zzz", "enter"}},
		{"wasted", 80, 24, []string{"w", "down"}},
		{"wasted-visit", 80, 24, []string{"w", "down", "enter"}},
		{"help", 80, 24, []string{"?"}},
		{"wide", 140, 40, []string{"[", "tab"}},
		{"smallest", 40, 12, []string{"tab", "down"}},
		{"too-small", 30, 8, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := New(sample(t), false)
			m.Update(tea.WindowSizeMsg{Width: c.width, Height: c.height})
			if press(m, c.keys...) {
				t.Fatal("quit")
			}
			got := ansi.Strip(m.Screen())
			check(t, m)
			file := filepath.Join("testdata", c.name+".golden")
			if *update {
				if err := os.WriteFile(file, []byte(got+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got+"\n" != string(want) {
				t.Errorf("screen:\n%s\nwant:\n%s", got, want)
			}
		})
	}
}

// check wants a screen that fits the terminal and holds nothing but text and colours.
func check(t *testing.T, m *Model) {
	t.Helper()
	screen := m.Screen()
	lines := strings.Split(screen, "\n")
	if len(lines) > m.height {
		t.Errorf("%d lines on %d", len(lines), m.height)
	}
	for _, l := range lines {
		if w := ansi.StringWidth(l); w > m.width {
			t.Errorf("%d columns on %d: %q", w, m.width, l)
		}
	}
	for i, r := range screen {
		if r == '\x1b' {
			end := strings.IndexByte(screen[i:], 'm')
			if end < 0 || end > 4 || screen[i+1] != '[' {
				t.Fatalf("an escape sequence that is no colour: %q", screen[i:min(len(screen), i+12)])
			}
		} else if r < ' ' && r != '\n' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == 0x202e {
			t.Fatalf("a control character: %q", r)
		}
	}
}

// TestColors: colours come with letters, and go with NO_COLOR.
func TestColors(t *testing.T) {
	for _, color := range []bool{true, false} {
		m := New(sample(t), color)
		m.Update(tea.WindowSizeMsg{Width: 80, Height: 24})
		press(m, "[", "[")
		for what, want := range map[string]string{"removed": "\x1b[31m D", "changed": "\x1b[33m C", "added": "\x1b[32m A"} {
			if strings.Contains(m.Screen(), want) != color {
				t.Errorf("color %t: %s", color, what)
			}
		}
	}
}

func TestQuit(t *testing.T) {
	for _, keys := range [][]string{{"q"}, {"ctrl+c"}, {"/", "ctrl+c"}, {"?", "ctrl+c"}, {"w", "q"}} {
		if m := New(sample(t), false); !press(m, keys...) {
			t.Errorf("%v does not quit", keys)
		}
	}
	if m := New(sample(t), false); press(m, "/", "q") || m.query != "q" {
		t.Error("q in a search quits")
	}
}

// TestAnyKeys presses keys at random on screens of all sizes: no panic, and every screen fits.
func TestAnyKeys(t *testing.T) {
	keys := []string{"up", "down", "left", "right", "tab", "enter", "space", "pgdown", "pgup", "home", "end", "esc", "[", "]", "t", "u", "a", "c", "d", "e", "E", "w", "?", "/", "n", "N",
		"s", "\x1b", "backspace", "ctrl+u"}
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		m := New(sample(t), seed%2 == 0)
		for range 400 {
			if rnd.IntN(20) == 0 {
				m.Update(tea.WindowSizeMsg{Width: rnd.IntN(130), Height: rnd.IntN(50)})
			}
			press(m, keys[rnd.IntN(len(keys))])
			if m.width > 0 && m.height > 0 {
				check(t, m)
			}
		}
	}
}

// TestNoLayers: an image FROM scratch without any.
func TestNoLayers(t *testing.T) {
	m := New(newImage(t, "empty"), false)
	m.Update(tea.WindowSizeMsg{Width: 80, Height: 24})
	press(m, "tab", "down", "enter", "w", "enter", "down", "t", "/", "x", "enter", "n")
	check(t, m)
}

// BenchmarkLayer is a step to another layer of an image with 300,000 files, all unfolded.
func BenchmarkLayer(b *testing.B) {
	var l [2]layer
	for k := range l {
		for i := range 150_000 {
			l[k].files = append(l[k].files, fmt.Sprintf("f usr/share/l%d/d%03d/some-file-name-%d 1", k, i/300, i))
		}
	}
	m := New(newImage(b, "big", l[:]...), true)
	m.Update(tea.WindowSizeMsg{Width: 120, Height: 50})
	press(m, "tab", "e")
	for b.Loop() {
		press(m, "[", "]")
		m.Screen()
	}
}
