// Command bench measures conex beside the container engines that are installed here (docker, podman, for builds BuildKit): the same command
// lines, in turns, with a network namespace and data folders of its own for each engine. It prints medians, ratios and
// whether conex meets its targets, and stops and removes everything it started.
//
//	bench [-conex bin/conex] [-peers docker,podman,buildkit] [-only REGEXP] [-n ROUNDS] [-dir FOLDER] [-json FILE]
//
// It needs root, Debian's busybox-static, docker-registry for pushes, and for a fair result a machine that does nothing else. What begins with
// image- works on an image of 512 MB, which takes a minute to make and 2 GB below /var/tmp. ext4 makes files slower for some minutes after many
// were deleted (it steps around their inodes), so that what ran before is measured too: -dir on a new file system keeps that out.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// bench is one run of this program.
type bench struct {
	dir     string // scratch: data folders, contexts, logs
	engines []*engine
	rounds  int
	results []row
	image   *bigImage // made when something needs it
	deleted time.Time // when many files were deleted last
	// fileSets counts the contexts of many files.
	fileSets int
}

// row is one measured thing.
type row struct {
	Name   string               `json:"name"`
	Unit   string               `json:"unit"` // ms, MB, % or µs
	Target float64              `json:"target,omitempty"`
	Values map[string][]float64 `json:"values"` // by engine, in the order of measuring
}

func main() {
	conex := flag.String("conex", "bin/conex", "the conex to measure")
	peers := flag.String("peers", "docker,podman,buildkit", "engines to compare with, where installed")
	only := flag.String("only", "", "measure only what matches this expression")
	rounds := flag.Int("n", 15, "rounds; slow measurements take fewer")
	out := flag.String("json", "", "write all values to this file")
	data := flag.String("dir", "/var/tmp", "where the engines' data lies; a new file system is fairest")
	list := flag.Bool("list", false, "print what can be measured")
	flag.Parse()
	if *list {
		for _, m := range measurements() {
			fmt.Println(m.name)
		}
		return
	}
	if err := run(*conex, *peers, *only, *data, *rounds, *out); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(conex, peers, only, data string, rounds int, out string) (err error) {
	if os.Geteuid() != 0 {
		return fmt.Errorf("run as root")
	}
	match, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	if conex, err = filepath.Abs(conex); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(data, "conex-bench.")
	if err != nil {
		return err
	}
	b := &bench{dir: dir, rounds: rounds}
	// A signal ends the present command; the loop sees it, and what was started is stopped on the way out.
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	defer func() {
		for _, e := range b.engines {
			if cerr := e.close(); cerr != nil && err == nil {
				err = cerr
			}
		}
		if rerr := os.RemoveAll(dir); rerr != nil && err == nil {
			err = rerr
		}
	}()
	if err := b.open(conex, strings.Split(peers, ",")); err != nil {
		return err
	}
	if err := b.prepare(); err != nil {
		return err
	}
	for _, m := range measurements() {
		if !match.MatchString(m.name) {
			continue
		}
		select {
		case <-stop:
			return fmt.Errorf("interrupted")
		default:
		}
		fmt.Fprintf(os.Stderr, "%s ...\n", m.name)
		b.results = append(b.results, b.measure(m))
	}
	b.print()
	if out != "" {
		data, err := json.MarshalIndent(b.results, "", "  ")
		if err != nil {
			return err
		}
		return os.WriteFile(out, append(data, '\n'), 0o644)
	}
	return nil
}

// measure runs one measurement on every engine in turns, the first engine changing with each round. An engine that can't do
// it is left out after its error.
func (b *bench) measure(m measurement) row {
	r := row{Name: m.name, Unit: "ms", Target: m.target, Values: map[string][]float64{}}
	if m.memory {
		r.Unit = "MB"
	}
	if m.unit != "" {
		r.Unit = m.unit
	}
	rounds := b.rounds
	if m.rounds > 0 {
		rounds = min(rounds, m.rounds)
	}
	failed := map[*engine]bool{}
	for i := range rounds + 1 { // round 0 warms caches and does not count
		for j := range b.engines {
			e := b.engines[(i+j)%len(b.engines)]
			if failed[e] || e.name == "buildkit" && !m.build {
				continue
			}
			v, err := m.once(b, e, i)
			if err != nil {
				fmt.Fprintf(os.Stderr, "  %s: %v\n", e.name, err)
				failed[e] = true
				delete(r.Values, e.name)
				continue
			}
			if i > 0 {
				r.Values[e.name] = append(r.Values[e.name], v)
			}
		}
	}
	return r
}

// print writes the table: a line for each measurement, medians, the best peer as a multiple of conex, target and verdict.
func (b *bench) print() {
	load, _ := os.ReadFile("/proc/loadavg")
	fmt.Printf("\nmedians, %d rounds, in turns; load %s\n\n%-22s", b.rounds, strings.TrimSpace(string(load)), "")
	for _, e := range b.engines {
		fmt.Printf("%12s", e.name)
	}
	fmt.Printf("%14s%12s\n", "best peer /", "target")
	for _, r := range b.results {
		fmt.Printf("%-22s", r.Name)
		ours, best := 0.0, 0.0
		for _, e := range b.engines {
			v := median(r.Values[e.name])
			switch {
			case len(r.Values[e.name]) == 0:
				fmt.Printf("%12s", "-")
			default:
				fmt.Printf("%12s", quantity(v, r.Unit))
				if e.name == "conex" {
					ours = v
				} else if best == 0 || v < best {
					best = v
				}
			}
		}
		ratio, verdict := "-", ""
		if ours > 0 && best > 0 && (r.Unit == "ms" || r.Unit == "MB") {
			ratio = fmt.Sprintf("%.1fx", best/ours)
		}
		if r.Target > 0 {
			verdict = "≤ " + quantity(r.Target, r.Unit)
			switch {
			case ours == 0:
			case ours <= r.Target:
				verdict += "  met"
			default:
				verdict += "  MISSED"
			}
		}
		fmt.Printf("%14s    %s\n", ratio, verdict)
	}
}

func quantity(v float64, unit string) string {
	switch {
	case unit != "ms":
		return fmt.Sprintf("%.1f %s", v, unit)
	case v >= 10_000:
		return fmt.Sprintf("%.1f s", v/1000)
	case v >= 100:
		return fmt.Sprintf("%.0f ms", v)
	case v < 1:
		return fmt.Sprintf("%.0f µs", 1000*v)
	}
	return fmt.Sprintf("%.1f ms", v)
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(values))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// timed runs the engine's command and returns its wall time in milliseconds.
func (e *engine) timed(args ...string) (float64, error) {
	cmd := e.command(args...)
	began := time.Now()
	err := e.runCommand(cmd)
	return float64(time.Since(began)) / 1e6, err
}

// do runs the engine's command outside of the clock.
func (e *engine) do(args ...string) error { return e.runCommand(e.command(args...)) }

func (e *engine) command(args ...string) *exec.Cmd {
	cmd := exec.Command(e.argv[0], append(slices.Clone(e.argv[1:]), args...)...)
	cmd.Env, cmd.Dir = e.env, e.dir
	return cmd
}
