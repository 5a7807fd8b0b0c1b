package build

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// warnings are a build's remarks.
func (e *env) warned() string {
	e.t.Helper()
	var out []string
	for _, ev := range e.events {
		if ev.Kind == Warning && ev.Finding == nil {
			out = append(out, ev.Text)
		}
	}
	return strings.Join(out, "\n")
}

// What a COPY takes in for nothing is told once, when it ran, and nothing else is.
func TestWaste(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	big := strings.Repeat("x", 2<<20)
	check := func(name, file, want string) {
		t.Helper()
		e.must(file)
		if got := strings.ReplaceAll(e.warned(), e.ctx+"/", ""); got != want {
			t.Errorf("%s: %q, not %q", name, got, want)
		}
	}
	e.write("src/a", "a")
	e.write(".git/objects/1", big)
	e.write("node_modules/m/index", big)
	e.write(".gitignore", "# built\n/dist/\n*.log\n.env\n")
	e.write("dist/out", big)
	e.write("x.log", "short")
	e.write(".env", "KEY=1")

	check("named", "FROM busybox\nCOPY src /src\nCOPY dist /dist\n", "")
	check("git is wanted", "FROM busybox\nCOPY .git /r/.git\nCOPY src /src\n", "")
	const all = "FROM busybox\nWORKDIR /w\nCOPY . .\nRUN rm -rf node_modules && mkdir -p node_modules/m && echo new > node_modules/m/index\n"
	check("all", all, "Dockerfile:3: COPY . . takes in 6.29MB that the image has no use for: .git (2.1MB), node_modules (2.1MB, written anew by a later step), "+
		"dist (2.1MB, left out by .gitignore), .env (5B, left out by .gitignore, may hold secrets). To leave it out, add to .dockerignore: .git node_modules dist .env")
	check("cached", all, "")
	e.write(".dockerignore", ".git\nnode_modules\ndist\n.env\n")
	check("left out", "FROM busybox\nCOPY . /left\nRUN true\n", "")
	check("deleted", "FROM busybox\nCOPY src /s\nRUN true\nCOPY . /left\nRUN true && rm -rf /left\n", "")

	e.write("data/a", big)
	check("deleted in the image", "FROM busybox\nCOPY data /data\nRUN rm -rf /data\n",
		"Dockerfile:2: COPY data /data takes in 2.1MB that later steps delete, and that stays in a layer: data (2.1MB). RUN --mount=type=bind reads without a copy: data")
	check("deleted in a stage that is not the image", "FROM busybox AS a\nCOPY data /d\nRUN echo 1 > /x; rm -rf /d\nFROM busybox\nCOPY --from=a /x /x\n", "")

	const plain = "FROM busybox\nCOPY . /all\n"
	check("first", plain, "")
	check("the Dockerfile alone", plain+"LABEL a=b\n", "Dockerfile:2: COPY . /all ran again only because Dockerfile changed. To leave that out, add to .dockerignore: Dockerfile")
	if err := os.Remove(filepath.Join(e.ctx, "src/a")); err != nil {
		t.Fatal(err)
	}
	check("more than that", plain, "")
}
