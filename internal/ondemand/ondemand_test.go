package ondemand

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"conex/internal/ondemand/held"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/moby/buildkit/frontend/dockerfile/command"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/opencontainers/go-digest"
	"github.com/ulikunitz/xz/lzma"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

var libraries = map[string]held.Library{"Digest": held.Digest, "Dockerfile": held.Dockerfile, "SSH": held.SSH, "Compress": held.Compress}

// elsewhere says that a package has nothing to initialise on this processor.
func elsewhere(p held.Package) bool {
	return runtime.GOARCH != "amd64" && p.Path == "github.com/klauspost/compress/internal/cpuinfo"
}

// TestOnDemand has all libraries in its program: none is initialised when it begins, and each works when it was asked for.
func TestOnDemand(t *testing.T) {
	for name, l := range libraries {
		if len(l) == 0 {
			t.Errorf("%s: no package is held: look at the records of this release of Go (runtime.initTask, runtime.doInit1), then at the build constraint of held", name)
		}
		for _, p := range l {
			if !p.Held() && !elsewhere(p) {
				t.Errorf("%s: %s has been initialised before main, or has nothing to initialise any more", name, p.Path)
			}
		}
	}
	if digest.DigestRegexp != nil || digest.SHA256.Available() {
		t.Error("go-digest is initialised")
	}
	if command.Commands != nil {
		t.Error("BuildKit's commands are initialised")
	}

	Digest()
	Digest()
	if err := digest.FromString("x").Validate(); err != nil {
		t.Error(err)
	}
	if err := digest.Digest("sha256:X").Validate(); err == nil {
		t.Error("a digest without form passes")
	}

	Dockerfile()
	res, err := parser.Parse(strings.NewReader("FROM a\nRUN --mount=type=cache,target=/c true\nCOPY <<E /x\ny\nE\n"))
	if err != nil {
		t.Fatal(err)
	}
	stages, _, err := instructions.Parse(res.AST, nil)
	if err != nil || len(stages) != 1 || len(stages[0].Commands) != 2 {
		t.Errorf("%v, %v", stages, err)
	}
	if res, err = parser.Parse(strings.NewReader("FROM a\nRUNN x\n")); err == nil {
		_, _, err = instructions.Parse(res.AST, nil)
	}
	// All that is known of an error, stacks too: what protobuf is linked for.
	if s := fmt.Sprintf("%+v", err); !strings.Contains(s, "RUNN") {
		t.Errorf("an unknown instruction is told as %q", s)
	}

	SSH()
	ring := agent.NewKeyring()
	if err := ring.Add(agent.AddedKey{PrivateKey: ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))}); err != nil {
		t.Fatal(err)
	}
	keys, err := ring.List()
	if err != nil || len(keys) != 1 || keys[0].Format != ssh.KeyAlgoED25519 {
		t.Errorf("%v, %v", keys, err)
	}
}

// TestCompress is of its own for its loops: whatever was made by the libraries comes back from them, and damage is an error.
func TestCompress(t *testing.T) {
	Compress()
	content := bytes.Repeat([]byte("what there is "), 10000)
	for name, k := range map[string]struct {
		writer func(io.Writer) (io.WriteCloser, error)
		reader func(io.Reader) (io.Reader, error)
	}{
		"gzip": {func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil }, func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
		"zstd": {func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) }, func(r io.Reader) (io.Reader, error) { return zstd.NewReader(r) }},
		"lzma": {func(w io.Writer) (io.WriteCloser, error) { return lzma.NewWriter2(w) }, func(r io.Reader) (io.Reader, error) { return lzma.NewReader2(r) }},
	} {
		var packed bytes.Buffer
		w, err := k.writer(&packed)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		for damage, b := range map[string][]byte{"": packed.Bytes(), "cut": packed.Bytes()[:packed.Len()/2], "other bytes": []byte("this is not compressed at all, by no means")} {
			r, err := k.reader(bytes.NewReader(b))
			var got []byte
			if err == nil {
				got, err = io.ReadAll(r)
			}
			if damage == "" && (err != nil || !bytes.Equal(got, content)) || damage != "" && err == nil {
				t.Errorf("%s %s: %d bytes, %v", name, damage, len(got), err)
			}
		}
	}
}

// The imports of held packages that are allowed. Of conex's packages each calls its function before; what the others do was read.
var importers = map[string]string{
	"conex/internal/dockerfile github.com/moby/buildkit/":                                  "",
	"conex/internal/compress github.com/klauspost/compress/":                               "",
	"conex/internal/compress github.com/ulikunitz/xz/":                                     "",
	"conex/internal/logs github.com/klauspost/compress/":                                   "",
	"conex/internal/build golang.org/x/crypto/ssh":                                         "",
	"conex/internal/ocispec github.com/opencontainers/go-digest":                           "",
	"github.com/opencontainers/image-spec/specs-go/v1 github.com/opencontainers/go-digest": "the type, which is a string",
	"github.com/moby/moby/api/types/image github.com/opencontainers/go-digest":             "the type, which is a string",
}

// TestImporters looks at conex's whole program: what is held is reached only by who asks for it, nothing that Go initialises before main needs
// it, and it is initialised in the order that Go would have had.
func TestImporters(t *testing.T) {
	output := func(name string, args ...string) []string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, stderr.Bytes())
		}
		return strings.Split(strings.TrimSpace(string(out)), "\n")
	}
	place, imports := map[string]int{}, map[string][]string{}
	for i, l := range output("go", "list", "-deps", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "conex/cmd/conex") {
		f := strings.Fields(l)
		place[f[0]], imports[f[0]] = i, f[1:]
	}
	program := filepath.Join(t.TempDir(), "conex")
	output("go", "build", "-o", program, "conex/cmd/conex")
	hasRecord := map[string]bool{}
	for _, l := range output("go", "tool", "nm", program) {
		f := strings.Fields(l)
		if p, ok := strings.CutSuffix(f[len(f)-1], "..inittask"); ok {
			hasRecord[strings.ReplaceAll(p, "%2e", ".")] = true
		}
	}

	isHeld := map[string]bool{}
	for name, l := range libraries {
		last := -1
		for _, p := range l {
			isHeld[p.Path] = true
			at, ok := place[p.Path]
			switch {
			case elsewhere(p):
			case !ok || !hasRecord[p.Path]:
				t.Errorf("%s: %s is not in the program or has nothing to initialise: take it from the list", name, p.Path)
			case at < last:
				t.Errorf("%s: %s stands behind a package that needs it", name, p.Path)
			}
			last = at
		}
	}
	used := map[string]bool{}
	allowed := func(from, to string) bool {
		for pair := range importers {
			if f, prefix, _ := strings.Cut(pair, " "); f == from && strings.HasPrefix(to, prefix) {
				used[pair] = true
				return true
			}
		}
		return false
	}
	reached := map[string]bool{}
	var walk func(string)
	walk = func(p string) {
		if reached[p] {
			return
		}
		reached[p] = true
		if isHeld[p] {
			t.Errorf("%s is held, and reached by an import that is not in the list of importers", p)
		}
		for _, q := range imports[p] {
			if !allowed(p, q) {
				walk(q)
			}
		}
	}
	walk("conex/cmd/conex")
	for pair := range importers {
		if !used[pair] {
			t.Errorf("%q: no such import", pair)
		}
	}

	needs := map[string]bool{}
	for _, p := range slices.SortedFunc(maps.Keys(place), func(a, b string) int { return place[a] - place[b] }) {
		needs[p] = isHeld[p] || slices.ContainsFunc(imports[p], func(q string) bool {
			return needs[q] && importers[p+" "+q] == ""
		})
		if needs[p] && !isHeld[p] && hasRecord[p] && !strings.HasPrefix(p, "conex/") {
			t.Errorf("%s is initialised before main and may need what is held: hold it too", p)
		}
	}
}
