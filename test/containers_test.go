package test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"conex/test/casefile"
	"conex/test/containers"
)

// TestContainers types every case of the table in containers/ to conex and compares the answers with what Docker's were: standard
// output, exit codes, the class and words of errors, fields of inspect.
func TestContainers(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("the expectations were recorded on amd64")
	}
	cases, err := containers.Load("containers")
	if err != nil {
		t.Fatal(err)
	}
	if only := os.Getenv("CONEX_CASES"); only != "" { // a part of GROUP/NAME
		cases = slices.DeleteFunc(cases, func(c *containers.Case) bool { return !strings.Contains(c.Group+"/"+c.Name, only) })
	}
	wants, err := casefile.LoadWants("containers")
	if err != nil {
		t.Fatal(err)
	}
	rows := compatRows(t, "../docs/compat.md", "../docs/SECURITY.md")
	for _, r := range containers.EverywhereRows() {
		if !rows[r] {
			t.Errorf("the difference %q has no row in docs/compat.md or docs/SECURITY.md", r)
		}
	}
	probe, rootfs := containersFixture(t)
	type outcome struct {
		diff []string
		err  error
	}
	outcomes := make([]outcome, len(cases))
	queue := make(chan int)
	var wg sync.WaitGroup
	// More than there are processors: many cases wait.
	for range min(4, len(cases)) {
		p := newContainersPlace(t, probe, rootfs)
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range queue {
				c := cases[i]
				answers, err := p.run(c)
				if err == nil {
					outcomes[i].diff, err = c.Differences(wants[c.Name], answers)
				}
				outcomes[i].err = err
			}
		}()
	}
	for i := range cases {
		queue <- i
	}
	close(queue)
	wg.Wait()
	_, err = os.Stat("/sys/fs/cgroup/memory")
	cgroup1 := err == nil
	pending := 0
	for i, c := range cases {
		if c.Pending != "" {
			pending++
		}
		t.Run(c.Name, func(t *testing.T) {
			for _, r := range c.Rows() {
				if !rows[r] {
					t.Errorf("the difference %q has no row in docs/compat.md or docs/SECURITY.md", r)
				}
			}
			o := outcomes[i]
			switch {
			case c.Needs == "cgroup1" && !cgroup1:
				t.Skip("its answers are those of a machine with cgroup v1")
			case o.err != nil:
				t.Fatal(o.err)
			case o.diff == nil && c.Pending != "":
				t.Logf("no longer pending: %s", c.Pending)
			case c.Pending != "":
				t.Skipf("pending: %s\n%s", c.Pending, strings.Join(o.diff, "\n"))
			case o.diff != nil:
				t.Errorf("Docker has - and conex +:\n%s", strings.Join(o.diff, "\n"))
			}
		})
	}
	t.Logf("%d cases, %d of them pending", len(cases), pending)
}

// containersFixture builds the probe and writes the root file system of the cases' images.
func containersFixture(t *testing.T) (probe, rootfs string) {
	dir := t.TempDir()
	probe, rootfs = filepath.Join(dir, "probe"), filepath.Join(dir, "rootfs.tar")
	cmd := exec.Command("go", "build", "-o", probe, "conex/test/containers/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	f, err := os.Create(rootfs)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := containers.WriteRootfs(f); err != nil {
		t.Fatal(err)
	}
	return probe, rootfs
}

// containersPlace is a world whose conex is called docker.
type containersPlace struct {
	containers.Place
	w *world
}

func newContainersPlace(t *testing.T, probe, rootfs string) *containersPlace {
	w := bareWorld(t)
	w.netns = newNetns(t)
	bin := filepath.Join(w.dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(w.bin, filepath.Join(bin, "docker")); err != nil {
		t.Fatal(err)
	}
	p := &containersPlace{w: w}
	p.Probe = probe
	p.Env = append(slices.Clone(w.env), "PATH="+bin+":"+os.Getenv("PATH"))
	p.Start = func(cmd *exec.Cmd) (err error) {
		w.inNetns(func() { err = cmd.Start() })
		return err
	}
	cmd := exec.Command("sh", "-c", containers.Import(rootfs))
	cmd.Env = p.Env
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("import: %v\n%s", err, out)
	}
	return p
}

func (p *containersPlace) run(c *containers.Case) ([][]string, error) {
	dir, err := os.MkdirTemp("", "case.")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	answers, err := p.Run(context.Background(), c, dir)
	if cerr := p.Clean(context.Background()); err == nil && cerr != nil {
		err = fmt.Errorf("clean up: %w", cerr)
	}
	return answers, err
}
