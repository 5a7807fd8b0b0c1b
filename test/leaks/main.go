// Command leaks tells what a run of all the tests has left in the kernel: it lists conex's traces on the machine, and the
// list after the tests may hold nothing that the list before did not.
//
//	leaks save FILE     before
//	leaks check FILE    after; exit status 1 and a line for each thing left
//
// Tests look after their own worlds. This looks at the whole machine, past what any of them knows about.
package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: leaks save|check FILE")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "leaks:", err)
		os.Exit(1)
	}
}

func run(verb, file string) error {
	now, err := traces()
	if err != nil {
		return err
	}
	switch verb {
	case "save":
		return os.WriteFile(file, []byte(strings.Join(now, "\n")), 0o600)
	case "check":
	default:
		return fmt.Errorf("no such verb: %s", verb)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before := strings.Split(string(data), "\n")
	left := newOnes(before, now)
	// The kernel takes a namespace down after its last process is gone: some tenths of a second, more on a busy machine.
	for deadline := time.Now().Add(20 * time.Second); len(left) > 0 && time.Now().Before(deadline); {
		time.Sleep(100 * time.Millisecond)
		if now, err = traces(); err != nil {
			return err
		}
		left = newOnes(before, now)
	}
	if len(left) > 0 {
		return errors.New("the tests left:\n\t" + strings.Join(left, "\n\t"))
	}
	fmt.Println("leaks: nothing left: no mount, network namespace, link, nftables table, cgroup or process")
	return nil
}

func newOnes(before, now []string) []string {
	return slices.DeleteFunc(slices.Clone(now), func(s string) bool { return slices.Contains(before, s) })
}

// traces lists what of conex is in the kernel, sorted.
func traces() ([]string, error) {
	var out []string
	for _, list := range []func() ([]string, error){mounts, namespaces, links, tables, cgroups, processes} {
		found, err := list()
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	slices.Sort(out)
	return out, nil
}

func mounts() ([]string, error) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []string
	s := bufio.NewScanner(f)
	for s.Scan() {
		field := strings.Fields(s.Text())
		// Of conex by its path, or by a type that nothing else here mounts.
		if strings.Contains(field[1], "conex") || field[2] == "erofs" || field[2] == "overlay" && strings.Contains(s.Text(), "conex") {
			out = append(out, "mount "+field[1]+" ("+field[2]+")")
		}
	}
	return out, s.Err()
}

// namespaces lists network namespaces that a name keeps alive; those of processes go with the processes.
func namespaces() ([]string, error) {
	entries, err := os.ReadDir("/run/netns")
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var out []string
	for _, e := range entries {
		out = append(out, "network namespace "+e.Name())
	}
	return out, err
}

func links() ([]string, error) {
	all, err := netlink.LinkList()
	var out []string
	for _, l := range all {
		name := l.Attrs().Name
		// Bridges are conex0 and cxb…, the host's ends of containers cxv…; others that a test has made are left by it as well.
		if t := l.Type(); t == "veth" || t == "bridge" || strings.HasPrefix(name, "cx") || strings.HasPrefix(name, "conex") || strings.Contains(l.Attrs().Alias, "conex") {
			out = append(out, t+" "+name)
		}
	}
	return out, err
}

func tables() ([]string, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	all, err := c.ListTables()
	var out []string
	for _, t := range all {
		if strings.HasPrefix(t.Name, "conex") {
			out = append(out, fmt.Sprintf("nftables table %s of family %d", t.Name, t.Family))
		}
		if t.Name != "filter" || err != nil {
			continue
		}
		// iptables' own table, in which conex speaks for its bridges.
		rules, rerr := c.GetRules(t, &nftables.Chain{Name: "FORWARD", Table: t})
		if rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			return nil, rerr
		}
		for _, r := range rules {
			for _, e := range r.Exprs {
				if cmp, ok := e.(*expr.Cmp); ok && (bytes.HasPrefix(cmp.Data, []byte("conex")) || bytes.HasPrefix(cmp.Data, []byte("cxb"))) {
					out = append(out, fmt.Sprintf("rule of iptables' FORWARD, family %d, for %s", t.Family, bytes.TrimRight(cmp.Data, "\x00")))
				}
			}
		}
	}
	return out, err
}

func cgroups() ([]string, error) {
	var out []string
	for _, pattern := range []string{"/sys/fs/cgroup/conex*/*", "/sys/fs/cgroup/*/conex*/*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		for _, p := range found {
			if st, err := os.Stat(p); err == nil && st.IsDir() && !resting(p) {
				out = append(out, "cgroup "+p)
			}
		}
	}
	return out, nil
}

// resting reports whether a folder is that of monitors, with none in it: it goes with its parent, at system teardown.
func resting(dir string) bool {
	procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	return filepath.Base(dir) == "monitors" && err == nil && len(procs) == 0
}

// program fits the command line of conex, its monitors and the test binaries that play them.
var program = regexp.MustCompile(`^(\S*/)?(conex|conex-monitor|docker)$`)

func processes() ([]string, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, d := range dirs {
		cmdline, err := os.ReadFile(d + "/cmdline")
		if err != nil {
			continue // gone meanwhile
		}
		argv := strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
		if program.MatchString(argv[0]) && !slices.Contains(argv, "dockerd") {
			out = append(out, "process "+filepath.Base(d)+": "+strings.Join(argv, " "))
		}
	}
	return out, nil
}
