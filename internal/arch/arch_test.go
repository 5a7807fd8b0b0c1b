// Package arch holds conex's architecture as a test: which package may import which, and why not.
//
// The table is DESIGN.md's: six floors, imports go down only. What a test file imports does not count, but its length does.
package arch

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// floors says on which floor every package of the module stands, by its path below internal/. A folder's packages below it belong
// to it. A package that is missing here fails the test: whoever adds one decides where it belongs.
var floors = map[string]int{
	"cli": 4, "explorer": 4,

	"engine": 3, "monitor": 3, "ocicli": 3,

	"archive": 2, "container": 2, "image": 2, "network": 2, "volume": 2, "build": 2, "collect": 2, "control": 2, "logs": 2, "events": 2, "analyze": 2, "doctor": 2,

	"blobs": 1, "layers": 1, "layertar": 1, "compress": 1, "registry": 1, "credentials": 1, "dockerfile": 1, "runtime": 1, "portmap": 1, "resolver": 1, "config": 1, "git": 1, "cdi": 1, "treecopy": 1, "dns": 1, "egress": 1,

	"disk": 0, "linux": 0, "safepath": 0, "ocispec": 0, "initstage": 0, "undo": 0, "plainjson": 0, "ondemand": 0,
}

// cmdFloor is that of cmd/..., and arch's own; nothing may import them.
const cmdFloor = 5

// sideways are the imports within a floor, each natural and without a way back, with the reason.
var sideways = map[string]string{
	"analyze image":              "what is looked at is an image",
	"archive image":              "an archive names images",
	"build image":                "a build's FROM and its result are images",
	"build network":              "a RUN step has the network of a container",
	"build volume":               "a cache mount with from= begins as a copy, like a volume",
	"collect image":              "images are what the sweep marks from",
	"container events":           "what changes a container's state tells it",
	"control container":          "the wire protocol carries the container's records",
	"layers layertar":            "a layer is a tar",
	"layers/erofsindex layertar": "the index is made while the tar is read",
	"logs container":             "what tags and details say of a container is in its record",
	"ocispec ondemand":           "go-digest is initialised when a digest is not of sha256",
	"registry blobs":             "what is fetched is verified and kept as a blob",
	"registry config":            "the configuration names mirrors",
	"registry credentials":       "a registry asks for what the user has logged in with",
	"treecopy layertar":          "names and attributes of a tar are checked in one place",
	"disk plainjson":             "a record is decoded once by most commands",
	"linux/cgroup linux/dbus":    "one of the drivers asks systemd",
	"linux/cgroup linux/inotify": "a scope of systemd goes before one can ask what happened in it",
	"linux/cgroup linux/nsfork":  "a scope of systemd begins with a process, which does nothing but wait",
	"linux/nsfork linux/slack":   "what it forks has the usual one",
	"linux/nsfork initstage":     "the stage is an execution of this program under a name",
	"linux/seccomp disk":         "compiled filters are cached in files, which only disk writes",
}

// banned are imports that go down, or out of the module, and are forbidden all the same.
var banned = []struct {
	// from is a path below internal/, which means what lies below it too; "*" is every package, "*!a,b" every one but a and b. to is an import path.
	from, to string
	why      string
}{
	{"engine", "conex/internal/monitor", "the engine only talks to monitors (control): an engine that could call one would end up being one, and a crash of it would take containers along"},
	{"monitor", "conex/internal/engine", "a monitor outlives every engine and must stay small: its memory counts once a container"},
	{"cli", "conex/internal/layers", "commands make one call of the engine; what stores can do, the API needs too"},
	{"cli", "conex/internal/blobs", "commands make one call of the engine"},
	{"cli", "conex/internal/runtime", "commands make one call of the engine"},
	{"cli", "conex/internal/registry", "commands make one call of the engine"},
	{"monitor", "conex/internal/image", "a monitor reads the container's record; what the image said was merged into it at create"},
	{"monitor", "conex/internal/registry", "a monitor never pulls; net/http's client alone would double its memory"},
	{"monitor", "conex/internal/build", "a monitor runs containers, builds run in the process that was asked"},
	{"*!dockerfile", "github.com/moby/buildkit", "one package knows BuildKit's grammar, so that a new version of it changes one package"},
	{"*!compress,logs", "github.com/klauspost/compress", "two packages call it, after ondemand.Compress"},
	{"*!compress", "github.com/ulikunitz/xz", "one package calls it, after ondemand.Compress"},
	{"*!build", "golang.org/x/crypto/ssh", "one file calls it, after ondemand.SSH"},
	{"*!ocispec", "github.com/opencontainers/go-digest", "one package calls it, after ondemand.Digest"},
	{"*!ondemand", "conex/internal/ondemand/held", "ondemand calls it once"},
	{"*!cli", "github.com/spf13/cobra", "flags are the command line's business"},
	{"*!explorer", "charm.land", "the full screen is one package's business"},
	{"*!explorer", "github.com/charmbracelet", "the full screen is one package's business"},
	{"cli", "conex/internal/explorer", "its terminal library would cost every command 0.8 ms at start-up: cmd/conex-explore is executed instead"},
	{"*", "github.com/google/go-containerregistry", "conex has its own registry client, which streams layers into the store; this one is for tests"},
	{"*", "github.com/distribution/reference", "compiles its expressions at start-up: 0.6 ms for every command; image.ParseReference is held equal to it by tests"},
	{"*", "github.com/sirupsen/logrus", "errors are returned, not logged"},
	{"*", "github.com/moby/moby/client", "the engine is in this program, there is no daemon to ask"},
	{"*", "github.com/docker/cli", "learn from it, import none of it: it brings telemetry, plugins and contexts"},
	{"*!engine,credentials,git,ocicli,network", "os/exec", "no other binary is needed; network has iptables-legacy change its own table (decision 45), engine and ocicli run the host's ps for `top` with options of ps, as Docker does, credentials the user's docker-credential-NAME, and git the host's git (decision 16)"},
}

// heavy must not be in conex's binary at all, however indirectly: each costs start-up time or megabytes.
var heavy = map[string]string{
	"google.golang.org/grpc":   "megabytes and registrations at start-up; what needs it is a second binary",
	"k8s.io":                   "what needs it is a second binary",
	"go.opentelemetry.io":      "megabytes and registrations at start-up",
	"database/sql":             "the disk is files: measured faster than SQLite and bbolt with several writers",
	"go.etcd.io":               "the disk is files",
	"github.com/docker/docker": "the old monorepo; its API types live in github.com/moby/moby/api",
	"net/http/pprof":           "registers handlers at start-up",
	"charm.land":               "0.8 ms at every start; conex-explore has it",
	"github.com/charmbracelet": "0.8 ms at every start; conex-explore has it",
	"testing":                  "a test's package in the binary",
}

const (
	maxLines = 700
	// maxTestLines is more, since tables of cases are long and read one at a time.
	maxTestLines = 1100
	maxMainLines = 100
)

// source is one file of the module that is parsed for the checks.
type source struct {
	name  string // from the module's folder
	pkg   string // path below internal/, or cmd/...
	test  bool
	file  *ast.File
	lines int
	// generated files may be as long as they like.
	generated bool
}

var fset = token.NewFileSet()

func sources(t *testing.T) []source {
	t.Helper()
	root := filepath.Join("..", "..")
	var all []source
	for _, top := range []string{"internal", "cmd"} {
		err := filepath.WalkDir(filepath.Join(root, top), func(name string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if d.IsDir() && d.Name() == "testdata" {
				return filepath.SkipDir
			}
			if d.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasPrefix(d.Name(), ".") {
				return nil
			}
			src, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			f, err := parser.ParseFile(fset, name, src, parser.ParseComments|parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			if tagged(f, "ignore", "deps") {
				return nil
			}
			rel, err := filepath.Rel(root, name)
			if err != nil {
				return err
			}
			all = append(all, source{
				name: rel, pkg: strings.TrimPrefix(path.Dir(rel), "internal/"), test: strings.HasSuffix(rel, "_test.go"), file: f,
				lines: bytes.Count(src, []byte("\n")), generated: ast.IsGenerated(f),
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(all) < 50 {
		t.Fatalf("only %d files found: looking in the wrong place", len(all))
	}
	return all
}

// tagged reports whether a file is built only with one of the tags, and so is no part of the program.
func tagged(f *ast.File, tags ...string) bool {
	for _, g := range f.Comments {
		for _, c := range g.List {
			if expr, ok := strings.CutPrefix(c.Text, "//go:build "); ok && slices.Contains(tags, strings.TrimSpace(expr)) {
				return true
			}
		}
	}
	return false
}

// floor returns a package's floor and whether the table has it.
func floor(pkg string) (int, bool) {
	if strings.HasPrefix(pkg, "cmd/") || pkg == "arch" {
		return cmdFloor, true
	}
	for p := pkg; p != "."; p = path.Dir(p) {
		if n, ok := floors[p]; ok {
			return n, true
		}
	}
	return 0, false
}

// within reports whether pkg is p or lies below it.
func within(pkg, p string) bool { return pkg == p || strings.HasPrefix(pkg, p+"/") }

func imports(s source) []string {
	var list []string
	for _, i := range s.file.Imports {
		p, _ := strconv.Unquote(i.Path.Value) //nolint:errcheck // the parser has seen to it
		list = append(list, p)
	}
	return list
}

func TestFloors(t *testing.T) {
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		from, ok := floor(s.pkg)
		if !ok {
			t.Errorf("%s: package %s stands on no floor: give it one in this test", s.name, s.pkg)
			continue
		}
		for _, imp := range imports(s) {
			to, ours := strings.CutPrefix(imp, "conex/internal/")
			if !ours {
				if strings.HasPrefix(imp, "conex/") {
					t.Errorf("%s imports %s: programs and tests are nobody's library", s.name, imp)
				}
				continue
			}
			n, ok := floor(to)
			switch {
			case !ok:
				t.Errorf("%s imports %s, which stands on no floor", s.name, imp)
			case n > from:
				t.Errorf("%s imports %s: floor %d may not import floor %d", s.name, imp, from, n)
			case n == from && !family(s.pkg, to) && sideways[s.pkg+" "+to] == "":
				t.Errorf("%s imports %s: both on floor %d; if that is natural and has no way back, say so in sideways", s.name, imp, n)
			}
		}
	}
}

// family reports whether two packages belong to one folder of the table, as layers and layers/erofsindex, linux/caps and linux/seccomp.
func family(a, b string) bool {
	top := func(p string) string { return strings.SplitN(p, "/", 2)[0] }
	return top(a) == top(b)
}

func TestBannedImports(t *testing.T) {
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		for _, imp := range imports(s) {
			for _, b := range banned {
				if matches(b.from, s.pkg) && within(imp, b.to) {
					t.Errorf("%s imports %s: %s", s.name, imp, b.why)
				}
			}
		}
	}
}

func matches(pattern, pkg string) bool {
	rest, star := strings.CutPrefix(pattern, "*")
	if !star {
		return within(pkg, pattern)
	}
	except := strings.Split(strings.TrimPrefix(rest, "!"), ",")
	return !slices.ContainsFunc(except, func(e string) bool { return e != "" && within(pkg, e) })
}

// TestReasons keeps the tables honest: no entry without a reason, none that is needed no more.
func TestReasons(t *testing.T) {
	used := map[string]bool{}
	for _, s := range sources(t) {
		for _, imp := range imports(s) {
			used[s.pkg+" "+strings.TrimPrefix(imp, "conex/internal/")] = true
		}
	}
	for pair, why := range sideways {
		if why == "" || !used[pair] {
			t.Errorf("sideways[%q] = %q: unused or without a reason", pair, why)
		}
	}
	for _, b := range banned {
		if b.why == "" {
			t.Errorf("banned %s -> %s has no reason", b.from, b.to)
		}
	}
}

func TestFileLengths(t *testing.T) {
	for _, s := range sources(t) {
		limit := maxLines
		switch {
		case s.generated:
			continue
		case s.test:
			limit = maxTestLines
		case strings.HasPrefix(s.pkg, "cmd/"):
			limit = maxMainLines
		}
		if s.lines > limit {
			t.Errorf("%s has %d lines, at most %d: split it by what its parts do", s.name, s.lines, limit)
		}
	}
}

// TestStartUp refuses work before main: every command pays for it.
func TestStartUp(t *testing.T) {
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		for _, d := range s.file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv == nil && d.Name.Name == "init" && !isTakeover(d) && s.pkg != "ondemand/held" {
					t.Errorf("%s: init() does more than call initstage.Takeover: every start of the program would pay for it", where(d))
				}
			case *ast.GenDecl:
				if d.Tok != token.VAR {
					continue
				}
				ast.Inspect(d, func(n ast.Node) bool {
					if _, ok := n.(*ast.FuncLit); ok {
						return false // runs later
					}
					if call, ok := n.(*ast.CallExpr); ok && strings.HasPrefix(callee(call), "regexp.") {
						t.Errorf("%s: %s at package level: every start of the program would compile it", where(call), callee(call))
					}
					return true
				})
			}
		}
	}
}

func isTakeover(f *ast.FuncDecl) bool {
	for _, st := range f.Body.List {
		e, ok := st.(*ast.ExprStmt)
		if !ok {
			return false
		}
		if c, ok := e.X.(*ast.CallExpr); !ok || !strings.HasPrefix(callee(c), "initstage.Takeover") && callee(c) != "runtime.LockOSThread" { // nanoseconds
			return false
		}
	}
	return true
}

func callee(c *ast.CallExpr) string {
	sel, ok := c.Fun.(*ast.SelectorExpr)
	if !ok {
		return ""
	}
	x, ok := sel.X.(*ast.Ident)
	if !ok {
		return ""
	}
	return x.Name + "." + sel.Sel.Name
}

func where(n ast.Node) string {
	p := fset.Position(n.Pos())
	return fmt.Sprintf("%s:%d", strings.TrimPrefix(filepath.ToSlash(p.Filename), "../../"), p.Line)
}

// digestMethods are those of go-digest that work only after ondemand.Digest.
var digestMethods = []string{"Validate", "Digester", "Verifier"}

// TestDigests holds that ocispec alone calls what has to be initialised.
func TestDigests(t *testing.T) {
	for _, s := range sources(t) {
		if s.pkg == "ocispec" || s.pkg == "ondemand" {
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok && len(call.Args) == 0 {
				if sel, ok := call.Fun.(*ast.SelectorExpr); ok && slices.Contains(digestMethods, sel.Sel.Name) {
					t.Errorf("%s: %s(): of a digest, call ocispec's instead", where(call), sel.Sel.Name)
				}
			}
			return true
		})
	}
}

// TestCompressors holds that who makes a reader or a writer of these libraries has asked for them before, in the same function: without that,
// damage would be no error.
func TestCompressors(t *testing.T) {
	seen := 0
	for _, s := range sources(t) {
		names := map[string]bool{}
		for _, i := range s.file.Imports {
			if p, _ := strconv.Unquote(i.Path.Value); within(p, "github.com/klauspost/compress") || within(p, "github.com/ulikunitz/xz") {
				names[path.Base(p)] = true
			}
		}
		if s.test || len(names) == 0 {
			continue
		}
		for _, d := range s.file.Decls {
			asked := false
			ast.Inspect(d, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				asked = asked || callee(call) == "ondemand.Compress"
				if sel, ok := call.Fun.(*ast.SelectorExpr); ok && strings.HasPrefix(sel.Sel.Name, "New") {
					pkg, _, _ := strings.Cut(callee(call), ".")
					if names[pkg] || sel.Sel.Name == "NewReader2" {
						seen++
						if !asked {
							t.Errorf("%s: %s without ondemand.Compress() before", where(call), sel.Sel.Name)
						}
					}
				}
				return true
			})
		}
	}
	if seen < 9 {
		t.Errorf("only %d calls found", seen)
	}
}

// TestNoHeavyPackages looks at the whole program, not only at what our own files name.
func TestNoHeavyPackages(t *testing.T) {
	cmd := exec.Command("go", "list", "-deps", "conex/cmd/conex")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.Bytes())
	}
	for _, pkg := range strings.Fields(string(out)) {
		for h, why := range heavy {
			if within(pkg, h) {
				t.Errorf("conex's binary contains %s: %s", pkg, why)
			}
		}
	}
}

// TestPackageDocs wants the package's one sentence, since a newcomer reads that first.
func TestPackageDocs(t *testing.T) {
	docs := map[string]bool{}
	for _, s := range sources(t) {
		if s.test && s.pkg != "arch" {
			continue
		}
		docs[s.pkg] = docs[s.pkg] || s.file.Doc != nil && strings.Contains(s.file.Doc.Text(), " ")
	}
	for pkg, ok := range docs {
		if !ok {
			t.Errorf("package %s has no doc comment: its first sentence says what it owns", pkg)
		}
	}
}
