package test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// netKilling is one kind of round: what is there before, and which command is running when something is killed.
type netKilling struct {
	name   string
	before [][]string
	cmd    []string
}

// netKillings work on two networks and a container that publishes ports.
func netKillings() []netKilling {
	nets := [][]string{{"network", "create", "one"}, {"network", "create", "--internal", "two"}}
	image := []string{"busybox", "sleep", "100000"}
	alone := slices.Concat([]string{"run", "-d", "--name", "victim", "-p", "8080:80", "-p", "8081:81/udp"}, image)
	bounded := slices.Concat([]string{"run", "-d", "--name", "victim", "-p", "8080:80", "--egress", "allow=192.0.2.0/24:80,*.example.org"}, image)
	both := slices.Concat([]string{"run", "-d", "--name", "victim", "-p", "8080:80", "--network", "name=one,alias=a", "--network", "two"}, image)
	with := func(cmds ...[]string) [][]string { return slices.Concat(nets, cmds) }
	return []netKilling{
		{"create", nil, []string{"network", "create", "one"}},
		{"create with a subnet", nil, []string{"network", "create", "--subnet", "10.77.0.0/24", "one"}},
		{"rm of a network that was used", with(both, []string{"rm", "-f", "victim"}), []string{"network", "rm", "one", "two"}},
		{"prune", with(both, []string{"rm", "-f", "victim"}), []string{"network", "prune", "-f"}},
		{"connect", with(alone), []string{"network", "connect", "--alias", "a", "one", "victim"}},
		{"disconnect", with(both), []string{"network", "disconnect", "one", "victim"}},
		{"connect with --egress", with(bounded), []string{"network", "connect", "one", "victim"}},
		{"disconnect with --egress", with(bounded, []string{"network", "connect", "one", "victim"}), []string{"network", "disconnect", "one", "victim"}},
		{"port add", with(alone), []string{"port", "add", "victim", "8082:82", "8083:83/udp"}},
		{"first port added", with([]string{"run", "-d", "--name", "victim", "busybox", "sleep", "100000"}), []string{"port", "add", "victim", "8082:82"}},
		{"port rm", with(alone), []string{"port", "rm", "victim", "8080", "8081/udp"}},
		{"run on two networks", with(), both},
		{"run --rm on two networks", with(), slices.Insert(slices.Clone(both), 2, "--rm")},
		{"start on two networks", with(both, []string{"stop", "-t", "0", "victim"}), []string{"start", "victim"}},
		{"stop", with(both), []string{"stop", "-t", "0", "victim"}},
		{"rm", with(both), []string{"rm", "-f", "victim"}},
	}
}

// TestNetworksKilledAtRandom kills the command or the container's monitor at a moment within the time of a command that changes
// networks. The next commands work, and when container and networks are removed, the kernel and the state folder hold what they held
// before: no link, address, element, chain, record or claim more. A container whose networks or ports were being changed starts again. CONEX_KILLS
// says how many rounds, CONEX_SEED repeats them, CONEX_KIND is a part of the name of those that are wanted.
func TestNetworksKilledAtRandom(t *testing.T) {
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
	w.conex("run", "--rm", "busybox", "true") // makes what stays: the default network's bridge, the table
	before := w.tracesAtRest()
	took := map[string]time.Duration{}
	ks := slices.DeleteFunc(netKillings(), func(k netKilling) bool { return !strings.Contains(k.name, os.Getenv("CONEX_KIND")) })
	if len(ks) == 0 {
		t.Fatal("CONEX_KIND: no kind of round has that in its name")
	}
	for i := range kills(t) {
		k := ks[i%len(ks)]
		if took[k.name] == 0 {
			w.prepareNet(k)
			took[k.name] = w.try(k.cmd...).took
			w.clearNets(t, k.name+", not killed", before)
		}
		whom := []string{"command", "monitor"}[rnd.IntN(2)]
		moment := time.Duration(rnd.Float64() * 1.2 * float64(took[k.name]))
		what := fmt.Sprintf("round %d: %s: %s killed after %v of %v", i, k.name, whom, moment, took[k.name])

		w.prepareNet(k)
		cmd := w.command(k.cmd...)
		w.start(cmd)
		for began := time.Now(); time.Since(began) < moment; { // a sleep would round the moment
		}
		if whom == "command" {
			kill9(t, cmd.Process.Pid)
		} else {
			w.killMonitor()
		}
		w.waitFor(cmd, what)
		if r := w.try("network", "ls", "-q"); r.code != 0 {
			t.Fatalf("%s: network ls: %s", what, r.stderr)
		}
		if slices.Contains([]string{"network", "port"}, k.cmd[0]) && len(w.containers()) > 0 {
			if r := w.try("start", "victim"); r.code != 0 {
				t.Errorf("%s: start: %s", what, r.stderr)
			}
		}
		w.clearNets(t, what, before)
		if t.Failed() {
			return
		}
	}
}

func (w *world) prepareNet(k netKilling) {
	w.t.Helper()
	for _, args := range k.before {
		w.conex(args...)
	}
}

// clearNets removes what a round has left, with commands that must succeed, and compares the traces.
func (w *world) clearNets(t *testing.T, what, before string) {
	t.Helper()
	for _, c := range w.containers() {
		if r := w.try("rm", "-f", c); r.code != 0 {
			t.Errorf("%s: rm: %s", what, r.stderr)
		}
	}
	for name := range strings.FieldsSeq(w.conex("network", "ls", "--filter", "type=custom", "--format", "{{.Name}}")) {
		if r := w.try("network", "rm", name); r.code != 0 {
			t.Errorf("%s: network rm %s: %s", what, name, r.stderr)
		}
	}
	// What a killed writer of records left goes with the next writer.
	w.conex("network", "create", "again")
	w.conex("network", "rm", "again")
	now := ""
	for deadline := time.Now().Add(giveUp); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if now = w.traces(); now == before {
			return // the kernel takes namespaces down in its own time
		}
	}
	t.Errorf("%s: left behind:\n%s", what, lineDifferences(before, now))
}

// carrier is what ip says of a bridge's ports, up to a second late.
var carrier = regexp.MustCompile(`\b(UP|DOWN|UNKNOWN|NO-CARRIER|LOWER_UP|linkdown)\b,? *| +$`)

// traces are all that networks leave on the host: links and their addresses, the table, iptables' rules, records, claims, monitors.
func (w *world) traces() string {
	w.t.Helper()
	var out strings.Builder
	w.inNetns(func() {
		for _, args := range [][]string{{"ip", "-br", "link"}, {"ip", "-br", "addr"}, {"ip", "route"}, {"ip", "-6", "route"}, {"nft", "list", "ruleset"}} {
			b, err := exec.Command(args[0], args[1:]...).CombinedOutput()
			fmt.Fprintf(&out, "%s\n%s", strings.Join(args, " "), carrier.ReplaceAll(b, nil))
			if err != nil {
				fmt.Fprintln(&out, err)
			}
		}
	})
	for _, dir := range []string{filepath.Join(w.root, "networks"), filepath.Join(w.state, "net"), filepath.Join(w.state, "c")} {
		err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
			if err == nil && filepath.Base(path) != "repair.lock" { // comes with the first look after what others did to nf_tables, and stays
				fmt.Fprintln(&out, path)
			}
			return nil // gone meanwhile
		})
		if err != nil {
			w.t.Fatal(err)
		}
	}
	for _, pid := range w.monitors() {
		fmt.Fprintln(&out, "monitor", pid)
	}
	return out.String()
}

// tracesAtRest are the traces when the last container's link and its monitor are gone.
func (w *world) tracesAtRest() (traces string) {
	w.t.Helper()
	w.eventually("the last container's link and monitor go", func() bool {
		traces = w.traces()
		return !strings.Contains(traces, "cxv") && len(w.monitors()) == 0 && !strings.Contains(traces, filepath.Join(w.state, "c")+"/")
	})
	return traces
}

// lineDifferences are the lines that only one of two texts has.
func lineDifferences(before, now string) string {
	var out strings.Builder
	b, n := strings.Split(before, "\n"), strings.Split(now, "\n")
	for _, l := range b {
		if !slices.Contains(n, l) {
			fmt.Fprintln(&out, "-", l)
		}
	}
	for _, l := range n {
		if !slices.Contains(b, l) {
			fmt.Fprintln(&out, "+", l)
		}
	}
	return out.String()
}
