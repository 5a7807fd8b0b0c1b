package test

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// TestScripts runs scripts/*.txt, each in a world of its own. On top of testscript's commands they have
//
//	conex ARG...             in PATH, with the world's folders, in its network namespace; docker is a link to it
//	exits CODE COMMAND...    runs a command that must end with that code
//	eventually COMMAND...    runs a command until it succeeds, two minutes at most
//	registry VAR [USER:HASH] starts a registry and sets VAR to its address
//	machine VAR              sets VAR to the flags of another root and state, as if on another machine
//	serve VAR                starts an HTTP server for files and git repositories
//	nameserver FILE ADDRESS [NAME=ADDRESS]...  starts a name server on an address of the world's host, which writes the names that it is asked for into FILE
//	fixture                  imports the busybox image
//	same TEXT                compares the last stdout, without its last newline, with TEXT, where \n is a newline
//
// and $BUSYBOX, the fixture's tar.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("scripts/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".txt")
		t.Run(name, func(t *testing.T) { runScript(t, f) })
	}
}

// scriptLimit is when a script that goes on is taken for one that hangs: ten times what the longest takes on a busy machine.
const scriptLimit = 8 * time.Minute

// eventually is when a script gives a condition up. Only what is broken waits so long: a machine that runs other suites too may need more than
// ten seconds for what takes it a tenth of one.
const eventually = 2 * time.Minute

func runScript(t *testing.T, file string) {
	hangs := time.AfterFunc(scriptLimit, func() {
		fmt.Fprintf(os.Stderr, "%s hangs. Below this process:\n%s", file, offspring(os.Getpid(), "  "))
	})
	t.Cleanup(func() { hangs.Stop() }) // the script runs on when we return: it is parallel to nothing, but testscript makes it so
	w := bareWorld(t)
	w.netns = newNetns(t)
	image, err := busyboxTar()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(w.dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	// A script's commands are children of the test, which is in the machine's own network namespace.
	real := filepath.Join(w.dir, "real")
	if err := os.Mkdir(real, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"conex", "docker"} {
		if err := os.Symlink(w.bin, filepath.Join(real, name)); err != nil {
			t.Fatal(err)
		}
		shim := fmt.Sprintf("#!/bin/sh\nexec nsenter --net=/proc/%d/fd/%d %s/%s \"$@\"\n", os.Getpid(), w.netns.Fd(), real, name)
		if err := os.WriteFile(filepath.Join(bin, name), []byte(shim), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	testscript.Run(t, testscript.Params{
		Files: []string{file},
		Setup: func(env *testscript.Env) error {
			for _, v := range w.env {
				if strings.HasPrefix(v, "CONEX_") {
					env.Vars = append(env.Vars, v)
				}
			}
			env.Setenv("PATH", bin+":"+os.Getenv("PATH"))
			env.Setenv("BUSYBOX", image)
			env.Setenv("CONEX", w.bin)
			env.Setenv("TERM", "xterm")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": scriptExits, "eventually": scriptEventually, "fixture": scriptFixture, "same": scriptSame,
			"registry": w.scriptRegistry, "machine": w.scriptMachine, "serve": w.scriptServe, "nameserver": w.scriptNameserver,
		},
	})
}

// offspring describes a process and those below it, with what each thread waits for in the kernel: a hang that is rare must say all it can the one
// time.
func offspring(pid int, indent string) string {
	var out strings.Builder
	cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	fmt.Fprintf(&out, "%s%d: %s\n", indent, pid, strings.ReplaceAll(string(cmdline), "\x00", " "))
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*", pid))
	for _, task := range tasks {
		wchan, _ := os.ReadFile(task + "/wchan")
		call, _ := os.ReadFile(task + "/syscall")
		_, fields := procStat(task + "/stat")
		fmt.Fprintf(&out, "%s  %s %s in %s, system call %s\n", indent, filepath.Base(task), fields[0], wchan, strings.TrimSpace(string(call)))
	}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, stat := range stats {
		if child, fields := procStat(stat); child != 0 && fields[1] == strconv.Itoa(pid) {
			out.WriteString(offspring(child, indent+"  "))
		}
	}
	return out.String()
}

// procStat reads a process's number, and its state, its parent and what follows. The command's name between may hold anything.
func procStat(path string) (pid int, fields []string) {
	b, err := os.ReadFile(path)
	head, _, _ := strings.Cut(string(b), " ")
	fields = strings.Fields(string(b)[strings.LastIndexByte(string(b), ')')+1:])
	if err != nil || len(fields) < 2 {
		return 0, []string{"gone", ""}
	}
	pid, _ = strconv.Atoi(head)
	return pid, fields
}

func TestOffspring(t *testing.T) {
	cmd := exec.Command("sh", "-c", "sleep 1000 & wait")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()                                   //nolint:errcheck // it is killed
	defer syscall.Kill(-cmd.Process.Pid, unix.SIGKILL) //nolint:errcheck // it is there
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		got := offspring(os.Getpid(), "")
		if strings.Contains(got, fmt.Sprintf("%d: sh -c", cmd.Process.Pid)) && strings.Contains(got, ": sleep 1000 \n") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("no sleep below this process:\n%s", got)
		}
	}
}

func scriptExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND...")
	}
	want, err := strconv.Atoi(args[0])
	if err != nil {
		ts.Fatalf("exits: %v", err)
	}
	got := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func scriptEventually(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: eventually COMMAND...")
	}
	var err error
	for deadline := time.Now().Add(eventually); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err = ts.Exec(args[0], args[1:]...); err == nil {
			return
		}
	}
	ts.Fatalf("not within %v: %v", eventually, err)
}

func (w *world) scriptMachine(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: machine VAR")
	}
	root, state := ts.MkAbs(".root-"+args[0]), ts.MkAbs(".state-"+args[0])
	ts.Setenv(args[0], "--root "+root+" --state "+state)
	conex := filepath.Join(w.dir, "bin", "conex")
	ts.Defer(func() {
		cmd := exec.Command(conex, "--root", root, "--state", state, "system", "teardown")
		cmd.Env = w.env
		if out, err := cmd.CombinedOutput(); err != nil {
			w.t.Errorf("teardown of %s: %v: %s", args[0], err, out)
		}
	})
}

func scriptFixture(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: fixture")
	}
	ts.Check(ts.Exec("conex", "import", "-c", `CMD ["sh"]`, ts.Getenv("BUSYBOX"), "busybox"))
}

func scriptSame(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: same TEXT")
	}
	got := strings.TrimSuffix(ts.ReadFile("stdout"), "\n")
	if want := strings.ReplaceAll(args[0], `\n`, "\n"); (got == want) == neg {
		ts.Fatalf("stdout is %q, want %q (negated: %t)", got, want, neg)
	}
}

// busyboxTar makes the fixture: Debian's busybox-static with a link for each applet, users root and nobody, and the folders of a root.
var busyboxTar = sync.OnceValues(func() (string, error) {
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return "", fmt.Errorf("%w (package busybox-static)", err)
	}
	list, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		return "", fmt.Errorf("busybox --list: %w", err)
	}
	f, err := os.CreateTemp("", "busybox.*.tar")
	if err != nil {
		return "", err
	}
	tw := tar.NewWriter(f)
	add := func(h tar.Header, content string) {
		h.Size, h.ModTime, h.Format = int64(len(content)), time.Unix(1700000000, 0), tar.FormatPAX
		if err == nil {
			err = tw.WriteHeader(&h)
		}
		if err == nil {
			_, err = tw.Write([]byte(content))
		}
	}
	for _, d := range []string{"bin", "etc", "home", "root", "tmp", "usr", "var"} {
		mode := int64(0o755)
		if d == "tmp" {
			mode = 0o1777
		}
		add(tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: mode}, "")
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, string(bin))
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" { // the list contains it
			add(tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + applet, Linkname: "busybox", Mode: 0o777}, "")
		}
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644}, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/group", Mode: 0o644}, "root:x:0:\nnogroup:x:65534:\n")
	if cerr := tw.Close(); err == nil {
		err = cerr
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return f.Name(), err
})
