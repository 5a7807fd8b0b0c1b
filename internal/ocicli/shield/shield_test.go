package shield

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// told is what testdata/tell prints, and how often Go started in its process.
type told struct {
	Args, Env []string
	ReadOnly  bool
	starts    int
}

// build makes the program, with the entry in assembly or without, under the runtime's name.
func build(t *testing.T, entry bool) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "conex-runtime")
	args := []string{"build", "-o", bin}
	if entry {
		args = append(args, "-ldflags=-E conexRuntimeEntry")
	}
	cmd := exec.Command("go", append(args, "./testdata/tell")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return bin
}

// trace has Go write a line when it starts.
const trace = "GODEBUG=inittrace=1"

// tell runs the program. env comes after trace.
func tell(t *testing.T, argv, env []string, attr os.ProcAttr) told {
	t.Helper()
	out, errs := temp(t), temp(t)
	attr.Files = append([]*os.File{nil, out, errs}, attr.Files...)
	attr.Env = append([]string{trace}, env...)
	p, err := os.StartProcess(argv[0], argv, &attr) // unlike os/exec, it passes the environment as it is
	if err != nil {
		t.Fatal(err)
	}
	st, err := p.Wait()
	if err != nil {
		t.Fatal(err)
	}
	said, err := os.ReadFile(errs.Name())
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	if !st.Success() {
		t.Fatalf("%.200q: %v\n%s", argv, st, said)
	}
	r := told{starts: strings.Count(string(said), "init runtime @")}
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatalf("%.200q: %v\n%s%s", argv, err, b, said)
	}
	for i, v := range r.Env {
		r.Env[i] = strings.TrimSuffix(v, "\x00")
	}
	r.Env = r.Env[:len(r.Env)-1] // what comes after the last end
	return r
}

func temp(t *testing.T) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// entries runs a test on both ways into the program.
func entries(t *testing.T, f func(t *testing.T, bin string, entry bool)) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	t.Run("go", func(t *testing.T) { f(t, build(t, false), false) })
	t.Run("assembly", func(t *testing.T) {
		if runtime.GOARCH != "amd64" && runtime.GOARCH != "arm64" {
			t.Skip("no entry for this architecture")
		}
		f(t, build(t, true), true)
	})
}

// TestExecutedAgain: what starts a process of a container's is executed by way of a read-only mount, once, and what it was given comes
// with it.
func TestExecutedAgain(t *testing.T) {
	entries(t, func(t *testing.T, bin string, entry bool) {
		many := make([]string, 5000)
		for i := range many {
			many[i] = fmt.Sprintf("V%d=%d", i, i)
		}
		for _, c := range []struct {
			args   []string
			env    []string
			wanted bool
		}{
			{[]string{"run", "id"}, nil, true},
			{[]string{"run", "id"}, []string{""}, true}, // the last string of the process may be as short as can be
			{[]string{"--root", "/x", "create", "--bundle", "", "id"}, []string{"A=b", "A=b", "no equals sign", "CONEX_RUNTIME_SEL=1", "CONEX_RUNTIME_SELFISH=1"}, true},
			{[]string{"exec", "id", "sh", "-c", strings.Repeat("long ", 10000)}, many, true},
			{[]string{"exec"}, []string{"C"}, true},
			{nil, nil, false},
			{[]string{""}, []string{""}, false},
			{[]string{"r", "ru", "runs", "cre", "creat", "created", "exe", "execs", "Run"}, nil, false},
			{[]string{"state", "id"}, many, false},
			{[]string{"run", "id"}, []string{"A=b", Env + "="}, false},
			{[]string{"run", "id"}, []string{"A=b", Env + "=77"}, false},
		} {
			got := tell(t, append([]string{bin}, c.args...), c.env, os.ProcAttr{})
			env := append([]string{trace}, c.env...)
			starts := 1
			if c.wanted {
				env = append(append([]string{Env + "=200"}, env...), "GOMAXPROCS="+Procs)
				if !entry { // which puts it last, and leaves out what is twice or empty
					starts = 2
					slices.Sort(got.Env)
					slices.Sort(env)
					got.Env = slices.Compact(got.Env)
					env = slices.Compact(slices.DeleteFunc(env, func(v string) bool { return v == "" }))
				}
			}
			name := fmt.Sprintf("%.60q with %d variables", c.args, len(c.env))
			if !slices.Equal(got.Args, append([]string{bin}, c.args...)) {
				t.Errorf("%s: arguments %.200q", name, got.Args)
			}
			if !slices.Equal(got.Env, env) {
				t.Errorf("%s: environment\n%.500q, want\n%.500q", name, got.Env, env)
			}
			if got.ReadOnly != c.wanted || got.starts != starts {
				t.Errorf("%s: read-only %t, %d starts, want %t, %d", name, got.ReadOnly, got.starts, c.wanted, starts)
			}
		}
	})
}

// TestDescriptorTaken: the descriptor gets the next free number, and no other than it stays open.
func TestDescriptorTaken(t *testing.T) {
	entries(t, func(t *testing.T, bin string, _ bool) {
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		const taken = 1000
		files := slices.Repeat([]*os.File{null}, taken-3)
		got := tell(t, []string{bin, "run"}, nil, os.ProcAttr{Files: files})
		n := -1
		for _, v := range got.Env {
			if s, ok := strings.CutPrefix(v, Env+"="); ok {
				if n, err = strconv.Atoi(s); err != nil {
					t.Error(err)
				}
			}
		}
		if !got.ReadOnly || n < taken || n > taken+10 {
			t.Errorf("read-only %t, environment %q", got.ReadOnly, got.Env)
		}
	})
}

// TestNotAllowed: who may not mount gets the program as it is, and it says what else is wrong.
func TestNotAllowed(t *testing.T) {
	entries(t, func(t *testing.T, bin string, _ bool) {
		for dir := filepath.Dir(bin); dir != os.TempDir(); dir = filepath.Dir(dir) {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		got := tell(t, []string{bin, "run"}, []string{"A=b"}, os.ProcAttr{Sys: nobody})
		if got.ReadOnly || got.starts != 1 || !slices.Equal(got.Env, []string{trace, "A=b"}) {
			t.Errorf("read-only %t, %d starts, environment %q", got.ReadOnly, got.starts, got.Env)
		}
	})
}
