package test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// kills is how many moments TestKilledAtRandom tries: CONEX_KILLS, else a few of each kind.
func kills(t *testing.T) int {
	t.Helper()
	s := os.Getenv("CONEX_KILLS")
	if s == "" {
		return 36
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("CONEX_KILLS: %v", err)
	}
	return n
}

// killing is one kind of round: what is there before, which command is running when something is killed.
type killing struct {
	name   string
	before [][]string
	cmd    []string
}

// killings work on a container "victim", which publishes a port or has no network.
func killings(net []string, policy string) []killing {
	run := append([]string{"-d", "--name", "victim", "--restart", policy, "--stop-timeout", "0"}, net...)
	image := []string{"busybox", "sh", "-c", `trap "exit 3" TERM; while :; do sleep 0.02; done`}
	all := append(append([]string{"run"}, run...), image...)
	create := append(append([]string{"create"}, run[1:]...), image...)
	return []killing{
		{"run", nil, all},
		{"run --rm", nil, append(append([]string{"run", "-d", "--rm", "--name", "victim"}, net...), image...)},
		{"start", [][]string{create}, []string{"start", "victim"}},
		{"stop", [][]string{all}, []string{"stop", "-t", "1", "victim"}},
		{"restart", [][]string{all}, []string{"restart", "-t", "1", "victim"}},
		{"rm", [][]string{all}, []string{"rm", "-f", "victim"}},
		{"rm stopped", [][]string{all, {"stop", "-t", "0", "victim"}}, []string{"rm", "victim"}},
		{"exec", [][]string{all}, []string{"exec", "victim", "sh", "-c", "echo a; echo b >&2"}},
	}
}

// TestKilledAtRandom kills the command, the container's monitor or all of the container's processes at a moment within the command's
// time. Whatever was there then, the next command settles it: the container's state is true, its name and port can be used again.
// CONEX_SEED repeats a run.
func TestKilledAtRandom(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("CONEX_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("CONEX_SEED=%d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	took := map[string]time.Duration{} // of a command that nobody disturbs
	for i := range kills(t) {
		net := []string{"--network", "none"}
		if rnd.IntN(2) == 0 {
			net = []string{"-p", "8080:80"}
		}
		policy := []string{"no", "always", "on-failure:3"}[rnd.IntN(3)]
		ks := killings(net, policy)
		k := ks[i%len(ks)]
		key := k.name + net[0]
		if took[key] == 0 {
			w.prepare(k)
			took[key] = w.try(k.cmd...).took
			w.clear()
		}
		whom := []string{"command", "monitor", "processes"}[rnd.IntN(3)]
		moment := time.Duration(rnd.Float64() * 1.2 * float64(took[key]))
		what := fmt.Sprintf("round %d: %s %s, restart %s: %s killed after %v of %v", i, k.name, net, policy, whom, moment, took[key])

		w.prepare(k)
		cmd := w.command(k.cmd...)
		w.start(cmd)
		for began := time.Now(); time.Since(began) < moment; { // a sleep would round the moment
		}
		switch whom {
		case "command":
			kill9(t, cmd.Process.Pid)
		case "monitor":
			w.killMonitor()
		case "processes":
			w.killProcesses()
		}
		// It may fail, it must end: whoever waits for something that was killed is told.
		w.waitFor(cmd, what)
		w.settled(what)
		w.clear()
		if t.Failed() {
			return
		}
		if got := w.conex(append(append([]string{"run", "--rm", "--name", "victim"}, net...), "busybox", "echo", "free")...); got != "free" {
			t.Fatalf("%s: the next run said %q", what, got)
		}
	}
}

func (w *world) prepare(k killing) {
	w.t.Helper()
	for _, args := range k.before {
		w.conex(args...)
	}
}

// clear removes the container if it is there.
func (w *world) clear() {
	w.t.Helper()
	if ids := w.containers(); len(ids) > 0 {
		w.conex(append([]string{"rm", "-f"}, ids...)...)
	}
}

// waitFor waits for a command to end, by itself or killed.
func (w *world) waitFor(cmd *exec.Cmd, what string) {
	w.t.Helper()
	done := make(chan struct{})
	go func() { // ends with the command
		defer close(done)
		_ = cmd.Wait() // however it ended
	}()
	select {
	case <-done:
	case <-time.After(giveUp):
		w.t.Fatalf("%s: the command does not end", what)
	}
}

// stateFile is what the test needs of state.json.
type stateFile struct {
	Status  string `json:"status"`
	Monitor int    `json:"monitor"`
	Pid     int    `json:"pid"`
	Cgroup  string `json:"cgroup"`
}

func (w *world) states() map[string]stateFile {
	files, _ := filepath.Glob(filepath.Join(w.state, "c", "*", "state.json"))
	all := map[string]stateFile{}
	for _, f := range files {
		var st stateFile
		if b, err := os.ReadFile(f); err == nil && json.Unmarshal(b, &st) == nil {
			all[filepath.Base(filepath.Dir(f))] = st
		}
	}
	return all
}

// killMonitor kills the monitor as soon as it has said who it is, or whatever process is about to become one.
func (w *world) killMonitor() {
	for _, st := range w.states() {
		if st.Monitor > 0 {
			kill9(w.t, st.Monitor)
			return
		}
	}
	w.killAll()
}

// killProcesses kills all that runs in the container's cgroup.
func (w *world) killProcesses() {
	for id := range w.states() {
		for _, pid := range cgroupPids(id) {
			kill9(w.t, pid)
		}
	}
}

// cgroupPids are the processes in a container's cgroup, in whatever hierarchies there are.
func cgroupPids(id string) []int {
	var pids []int
	seen := map[int]bool{}
	for _, pattern := range []string{"/sys/fs/cgroup/*/conex/" + id, "/sys/fs/cgroup/conex/" + id} {
		files, _ := filepath.Glob(pattern + "/cgroup.procs")
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				continue // gone
			}
			for _, s := range strings.Fields(string(b)) {
				if pid, err := strconv.Atoi(s); err == nil && pid > 0 && !seen[pid] {
					seen[pid] = true
					pids = append(pids, pid)
				}
			}
		}
	}
	return pids
}

// settled checks that what conex says of each container is true, as soon as the kernel has ended what was killed.
func (w *world) settled(what string) {
	w.t.Helper()
	why := ""
	for deadline := time.Now().Add(giveUp); ; time.Sleep(10 * time.Millisecond) {
		if why = w.untrue(); why == "" {
			return
		}
		if time.Now().After(deadline) {
			w.t.Errorf("%s: %s\n%s%s", what, why, w.try("ps", "-a", "--no-trunc").stdout, w.try("why", "victim").stdout)
			return
		}
	}
}

// untrue says what of conex's words about its containers is not true, "" if all is.
func (w *world) untrue() string {
	ids := w.containers()
	if len(ids) > 1 {
		return fmt.Sprintf("there are %d containers", len(ids))
	}
	for _, id := range ids {
		r := w.try("inspect", "-f", "{{.State.Status}} {{.State.Running}} {{.State.Pid}} {{.State.ExitCode}} {{.State.StartedAt}} {{.State.FinishedAt}}", id)
		if r.code != 0 {
			if strings.Contains(r.stderr, "o such ") {
				continue // --rm has caught up
			}
			return r.stderr
		}
		f := strings.Fields(r.stdout)
		pid, err := strconv.Atoi(f[2])
		if err != nil {
			return r.stdout
		}
		switch f[0] {
		case "running":
			if f[1] != "true" || !alive(pid) {
				return fmt.Sprintf("it is said to run as %d, which does not live", pid)
			}
			held := false
			for _, st := range w.states() {
				held = held || st.Monitor > 0 && syscall.Kill(st.Monitor, 0) == nil
			}
			if !held {
				return "it is said to run and nobody watches it"
			}
		case "created", "exited":
			if pids := cgroupPids(id); len(pids) > 0 {
				return fmt.Sprintf("it is said to be %s, and processes %v live in its cgroup", f[0], pids)
			}
			if f[0] == "exited" && strings.HasPrefix(f[5], "0001") {
				return "it ended at no time"
			}
			if f[0] == "created" && !strings.HasPrefix(f[4], "0001") {
				return "it is created and has run"
			}
		default: // restarting: until it runs
			return "it is " + f[0]
		}
	}
	return ""
}
