package build

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What COPY --from takes counts, not what else the stage holds.
func TestCopyFromBySelection(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	file := func(noise, out string) string {
		return "FROM busybox AS b\nRUN mkdir /out && echo " + out + " > /out/f && echo " + noise + " > /noise\nFROM scratch\nCOPY --from=b /out/ /\nCOPY --from=b /out/f /again\n"
	}
	first := e.must(file("1", "x"))
	e.ran("RUN mkdir /out && echo x > /out/f && echo 1 > /noise", "COPY --from=b /out/ /", "COPY --from=b /out/f /again")
	second := e.must(file("2", "x"))
	e.ran("RUN mkdir /out && echo x > /out/f && echo 2 > /noise")
	if first.ID != second.ID {
		t.Errorf("images %s and %s of the same files", first.ID, second.ID)
	}
	third := e.must(file("3", "y"))
	e.ran("RUN mkdir /out && echo y > /out/f && echo 3 > /noise", "COPY --from=b /out/ /", "COPY --from=b /out/f /again")
	e.wantTree(third, map[string]string{"f": "644 0:0 y\n", "again": "644 0:0 y\n"})
	e.must(file("4", "x"))
	e.ran("RUN mkdir /out && echo x > /out/f && echo 4 > /noise")
}

// Names of one file count as its content each.
func TestCopyFromLinked(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	file := func(noise string) string {
		return "FROM busybox AS b\nRUN mkdir /out && echo x > /out/f && ln /out/f /out/g && ln -s f /out/h && echo " + noise + " > /noise\nFROM scratch\nCOPY --from=b /out/ /\n"
	}
	first := e.must(file("1"))
	second := e.must(file("2"))
	e.ran("RUN mkdir /out && echo x > /out/f && ln /out/f /out/g && ln -s f /out/h && echo 2 > /noise")
	if first.ID != second.ID {
		t.Error("two images of the same files")
	}
}

// The time of an image is that of its newest file, not that of the build: so it is the same elsewhere.
func TestTimesComeFromFiles(t *testing.T) {
	const file = "FROM scratch\nLABEL a=b\nCOPY a /\nCOPY b /\nWORKDIR /w\nCMD [\"x\"]\n"
	when := time.Date(2021, 3, 4, 5, 6, 7, 0, time.UTC)
	write := func(e *env) {
		for i, name := range []string{"b", "a"} {
			e.write(name, name)
			at := when.AddDate(0, i, 0)
			if err := os.Chtimes(filepath.Join(e.ctx, name), at, at); err != nil {
				t.Fatal(err)
			}
		}
	}
	e, other := newEnv(t), newEnv(t)
	write(e)
	img := e.must(file)
	if want := when.AddDate(0, 1, 0); !img.Created.Equal(want) {
		t.Errorf("created %v, want %v", img.Created, want)
	}
	write(other)
	if again := other.must(file); again.ID != img.ID {
		t.Errorf("another machine's image is %s, not %s", again.ID, img.ID)
	}
	epoch := "86400"
	img = e.must(file, func(r *Request) { r.BuildArgs = map[string]*string{"SOURCE_DATE_EPOCH": &epoch} })
	if want := time.Unix(86400, 0); !img.Created.Equal(want) {
		t.Errorf("created %v with SOURCE_DATE_EPOCH", img.Created)
	}
	for _, h := range img.Config.History {
		if !h.Created.Equal(time.Unix(86400, 0)) {
			t.Errorf("%s: %v with SOURCE_DATE_EPOCH", h.CreatedBy, h.Created)
		}
	}
	bad := "soon"
	if _, err := e.build(file, func(r *Request) { r.BuildArgs = map[string]*string{"SOURCE_DATE_EPOCH": &bad} }); err == nil {
		t.Error("SOURCE_DATE_EPOCH=soon was taken")
	}
}

func TestNoCacheFilter(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	const file = "FROM scratch AS one\nCOPY a /1\nFROM scratch AS two\nCOPY a /2\nFROM scratch\nCOPY --from=one /1 /\nCOPY --from=two /2 /\n"
	e.must(file)
	e.must(file, func(r *Request) { r.NoCacheFilter = []string{"two"} })
	e.ran("COPY a /2")
}

// Which links a selection follows, and which a copy replaces, as tried with BuildKit 0.34.2.
func TestLinksOfCopy(t *testing.T) {
	e := newEnv(t)
	e.write("d/x", "X")
	e.write("e/x", "E")
	e.write("ld", "->d")
	e.write("lx", "->d/x")
	for file, want := range map[string]map[string]string{
		// Before the first wildcard they are followed, behind it only the last.
		"COPY ld/* /o/": {"o": "755 0:0", "o/x": "644 0:0 X"},
		"COPY */x /o/":  {"o": "755 0:0", "o/x": "644 0:0 E"},
		"COPY l* /o/":   {"o": "755 0:0", "o/x": "644 0:0 X", "o/lx": "644 0:0 X"},
		// --parents follows none.
		"COPY --parents lx ld /o/":    {"o": "755 0:0", "o/lx": "-> d/x", "o/ld": "-> d"},
		"COPY --parents l*/x e/x /o/": {"o": "755 0:0", "o/e": "755 0:0", "o/e/x": "644 0:0 E"},
		// One in a folder is replaced, one that the destination names is written through.
		"COPY l* /o/\nCOPY --parents lx /o/\nCOPY <<lx /o/\nnew\nlx": {"o": "755 0:0", "o/x": "644 0:0 X", "o/lx": "644 0:0 new\n"},
		"COPY d /o/\nCOPY --parents lx /\nCOPY e/x /lx":              {"o": "755 0:0", "o/x": "644 0:0 X", "lx": "-> d/x", "d": "755 0:0", "d/x": "644 0:0 E"},
	} {
		img, err := e.build("FROM scratch\n" + file + "\n")
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		t.Log(file)
		e.wantTree(img, want)
	}
	e.refused("FROM scratch\nCOPY no/*/x /o/", `"/no": not found`)
	e.refused("FROM scratch\nCOPY d/x/* /o/", `"/d/x": not found`)
	e.refused("FROM scratch\nCOPY --parents ld/x /o/", `"/ld/x": not found`)
	e.must("FROM scratch\nCOPY --parents no/*/x /o/")
	e.must("FROM scratch\nCOPY no* /o/")
}

// A COPY --link is found again on another base, by its definition and by what it copies from a stage that came about anew.
func TestLinkReuse(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	e.write("b", "B")
	file := func(base string) string {
		return "FROM scratch AS from\nCOPY " + base + " /one\nCOPY a /two\nFROM scratch\nCOPY " + base + " /base\nCOPY --link a /x/\nCOPY --link --from=from /two /y/\nCOPY --link --chown=5 a /z\n"
	}
	e.wantTree(e.must(file("a")), map[string]string{
		"base": "644 0:0 A", "x": "755 0:0", "x/a": "644 0:0 A", "y": "755 0:0", "y/two": "644 0:0 A", "z": "644 5:5 A",
	})
	linked := func() (ran []string) {
		for _, name := range e.ended(Done) {
			if strings.Contains(name, "--link") {
				ran = append(ran, name)
			}
		}
		return ran
	}
	if ran := linked(); len(ran) != 3 {
		t.Errorf("ran %q", ran)
	}
	e.must(file("b"))
	if ran := linked(); len(ran) > 0 {
		t.Errorf("ran again: %q", ran)
	}
}
