package ocicli

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"conex/internal/linux/cgroup"
	"conex/internal/linux/pidfd"
	"conex/internal/linux/slack"
	"conex/internal/runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// view is a container as state and list show it, with runc's names.
type view struct {
	Version     string               `json:"ociVersion"`
	ID          string               `json:"id"`
	Pid         int                  `json:"pid"`
	Status      specs.ContainerState `json:"status"`
	Bundle      string               `json:"bundle"`
	RootFS      string               `json:"rootfs"`
	Created     time.Time            `json:"created"`
	Annotations map[string]string    `json:"annotations,omitempty"`
	Owner       string               `json:"owner"`
}

func (c *container) view() view {
	s := c.state(c.status(), c.rec.Pid)
	v := view{Version: s.Version, ID: c.id, Pid: s.Pid, Status: s.Status, Bundle: s.Bundle, RootFS: c.rec.RootFS, Created: c.rec.Created, Annotations: s.Annotations}
	if v.Status == specs.StateStopped {
		v.Pid = 0
	}
	return v
}

func printJSON(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err == nil {
		_, err = os.Stdout.Write(append(b, '\n'))
	}
	return err
}

func stateCommand(*flag.FlagSet) func(*app, []string) error {
	return func(a *app, args []string) error {
		c, err := a.open(args[0])
		if err != nil {
			return err
		}
		return printJSON(c.view())
	}
}

func listCommand(fs *flag.FlagSet) func(*app, []string) error {
	var format string
	var quiet bool
	for _, n := range []string{"format", "f"} {
		fs.StringVar(&format, n, "table", "")
	}
	for _, n := range []string{"quiet", "q"} {
		fs.BoolVar(&quiet, n, false, "")
	}
	return func(a *app, args []string) error {
		all, err := a.list()
		if err != nil {
			return err
		}
		views := make([]view, 0, len(all))
		for _, c := range all {
			v := c.view()
			v.Owner = c.owner()
			views = append(views, v)
		}
		if quiet {
			for _, v := range views {
				fmt.Println(v.ID)
			}
			return nil
		}
		switch format {
		case "json":
			b, err := json.Marshal(views)
			if err == nil {
				_, err = os.Stdout.Write(append(b, '\n'))
			}
			return err
		case "table":
			w := tabwriter.NewWriter(os.Stdout, 12, 1, 3, ' ', 0)
			fmt.Fprint(w, "ID\tPID\tSTATUS\tBUNDLE\tCREATED\tOWNER\n")
			for _, v := range views {
				fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\n", v.ID, v.Pid, v.Status, v.Bundle, v.Created.Format(time.RFC3339Nano), v.Owner)
			}
			return w.Flush()
		}
		return fmt.Errorf("list: --format %q is none of table, json", format)
	}
}

// owner is who made the container: root by name, others by number.
func (c *container) owner() string {
	var st unix.Stat_t
	if unix.Stat(c.dir, &st) != nil {
		return ""
	}
	if st.Uid == 0 {
		return "root"
	}
	return "#" + strconv.Itoa(int(st.Uid))
}

func psCommand(fs *flag.FlagSet) func(*app, []string) error {
	var format string
	for _, n := range []string{"format", "f"} {
		fs.StringVar(&format, n, "table", "")
	}
	return func(a *app, args []string) error {
		if format != "table" && format != "json" {
			return fmt.Errorf("ps: --format %q is none of table, json", format)
		}
		c, err := a.open(args[0])
		if err != nil {
			return err
		}
		cg, err := c.cgroup()
		if err != nil {
			return err
		}
		pids, err := cg.Pids()
		if err != nil {
			return err
		}
		if format == "json" {
			b, err := json.Marshal(append([]int{}, pids...))
			if err == nil {
				_, err = os.Stdout.Write(append(b, '\n'))
			}
			return err
		}
		options := args[1:]
		if len(options) == 0 {
			options = []string{"-ef"}
		}
		var out []byte
		err = slack.Run(func() (err error) {
			out, err = exec.Command("ps", options...).Output()
			return err
		})
		if err != nil {
			return fmt.Errorf("ps %s: %w", strings.Join(options, " "), err)
		}
		lines := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
		column := slices.Index(strings.Fields(lines[0]), "PID")
		if column < 0 {
			return errors.New("ps: couldn't find the column PID in its output")
		}
		fmt.Println(lines[0])
		for _, l := range lines[1:] {
			f := strings.Fields(l)
			if len(f) <= column {
				continue
			}
			if pid, err := strconv.Atoi(f[column]); err == nil && slices.Contains(pids, pid) {
				fmt.Println(l)
			}
		}
		return nil
	}
}

func killCommand(fs *flag.FlagSet) func(*app, []string) error {
	var all bool
	for _, n := range []string{"all", "a"} {
		fs.BoolVar(&all, n, false, "")
	}
	return func(a *app, args []string) error {
		name := "SIGTERM"
		if len(args) > 1 {
			name = args[1]
		}
		sig, err := parseSignal(name)
		if err != nil {
			return err
		}
		c, err := a.open(args[0])
		if err != nil {
			return err
		}
		if all {
			return c.killAll(sig)
		}
		status := c.status()
		if status == specs.StateStopped || c.rec.Pid == 0 {
			return errNotRunning
		}
		if err := c.signal(sig); err != nil {
			return err
		}
		if sig != unix.SIGKILL {
			return nil
		}
		if spec, err := c.config(); err != nil || ownPids(spec) && status != "paused" {
			return err
		}
		// Without a pid namespace of its own the others would outlive the first; and the frozen die when they are thawed.
		return c.killAll(sig)
	}
}

// ownPids reports whether the end of the first process is the end of all.
func ownPids(s *specs.Spec) bool {
	return slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace && n.Path == "" })
}

// signal sends sig to the first process, by a descriptor, which can't mean another process with the number.
func (c *container) signal(sig unix.Signal) error {
	fd, err := pidfd.Open(c.rec.Pid)
	if errors.Is(err, pidfd.ErrExited) {
		return errNotRunning
	}
	if err != nil {
		return err
	}
	defer fd.Close()
	if !c.alive() { // looked at after the descriptor was there
		return errNotRunning
	}
	err = pidfd.SendSignal(fd, sig)
	if errors.Is(err, pidfd.ErrExited) {
		return errNotRunning
	}
	return err
}

// killAll sends sig to every process in the container's cgroup.
func (c *container) killAll(sig unix.Signal) error {
	cg, err := c.cgroup()
	if err != nil {
		return err
	}
	if sig == unix.SIGKILL {
		if err := cg.Kill(); err != nil && !errors.Is(err, cgroup.ErrNotExist) {
			return err
		}
		if frozen, err := cg.Frozen(); err == nil && frozen {
			return cg.Thaw()
		}
		return nil
	}
	pids, err := cg.Pids()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, sig); err != nil && err != unix.ESRCH {
			return fmt.Errorf("signal process %d: %w", pid, err)
		}
	}
	return nil
}

// parseSignal reads a signal's number, or its name with or without SIG.
func parseSignal(s string) (unix.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil {
		if n < 0 || n > 64 {
			return 0, fmt.Errorf("unknown signal %q", s)
		}
		return unix.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if sig := unix.SignalNum(name); sig != 0 {
		return sig, nil
	}
	for base, at := range map[string]int{"SIGRTMIN": 34, "SIGRTMAX": 64} {
		rest, ok := strings.CutPrefix(name, base)
		if !ok {
			continue
		}
		off := 0
		if rest != "" {
			var err error
			if off, err = strconv.Atoi(rest); err != nil {
				break
			}
		}
		if n := at + off; n >= 34 && n <= 64 {
			return unix.Signal(n), nil
		}
	}
	return 0, fmt.Errorf("unknown signal %q", s)
}

func pauseCommand(on bool) func(*flag.FlagSet) func(*app, []string) error {
	return func(*flag.FlagSet) func(*app, []string) error {
		return func(a *app, args []string) error {
			c, err := a.openLocked(args[0])
			if err != nil {
				return err
			}
			defer c.lock.Release()
			cg, err := c.cgroup()
			if err != nil {
				return err
			}
			switch status := c.status(); {
			case on && (status == specs.StateRunning || status == specs.StateCreated):
				return cg.Freeze()
			case on:
				return fmt.Errorf("container not running or created: %s", status)
			case status == "paused":
				return cg.Thaw()
			default:
				return errors.New("container not paused")
			}
		}
	}
}

func deleteCommand(fs *flag.FlagSet) func(*app, []string) error {
	var force bool
	for _, n := range []string{"force", "f"} {
		fs.BoolVar(&force, n, false, "")
	}
	return func(a *app, args []string) error {
		err := a.remove(args[0], force)
		if force && errors.Is(err, errNotExist) {
			return nil
		}
		return err
	}
}

// remove deletes a container; with force its processes are killed first.
func (a *app) remove(id string, force bool) error {
	c, err := a.openLocked(id)
	if err != nil {
		return err
	}
	spec, err := c.config()
	if errors.Is(err, fs.ErrNotExist) { // its creator died at once
		return c.remove()
	}
	if err != nil {
		c.lock.Release()
		return err
	}
	status := c.status()
	if !force && status != specs.StateStopped && status != specs.StateCreated {
		c.lock.Release()
		return fmt.Errorf("cannot delete container %s that is not stopped: %s", id, status)
	}
	if status != specs.StateStopped {
		if err := c.killAll(unix.SIGKILL); err != nil {
			c.lock.Release()
			return err
		}
	}
	return a.dispose(c, spec)
}

// dispose deletes a locked container whose processes have ended or are about to.
func (a *app) dispose(c *container, spec *specs.Spec) error {
	cfg, err := c.runtimeConfig()
	if err == nil {
		// Its cgroup says when all have.
		var box runtime.Container
		if box, err = runtime.Open(cfg, 0); errors.Is(err, os.ErrProcessDone) {
			err = box.Delete()
		}
	}
	if err != nil {
		c.lock.Release()
		return err
	}
	if strings.HasPrefix(spec.Linux.CgroupsPath, "/"+Name+"/") { // the folder of those whose spec names none
		if err := cgroup.Prune(Name); err != nil {
			a.warn(err)
		}
	}
	if spec.Hooks != nil {
		// Whatever they say, the container goes (runtime-spec, "Lifecycle").
		for _, h := range spec.Hooks.Poststop {
			if err := runtime.RunHooks("poststop", []specs.Hook{h}, c.state(specs.StateStopped, 0)); err != nil {
				a.warn(err)
			}
		}
	}
	return c.remove()
}
