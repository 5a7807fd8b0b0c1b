package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// containerMeasurements are what people feel when they run containers, and what those keep.
func containerMeasurements() []measurement {
	return append([]measurement{
		{name: "run-rm-none", target: 20, once: simple("run", "--rm", "--network", "none", image, "true")},
		{name: "run-rm-bridge", target: 30, once: simple("run", "--rm", image, "true")},
		{name: "run-rm-port", target: 35, once: simple("run", "--rm", "-p", "18473:80", image, "true")},
		{name: "run-d", target: 25, once: func(b *bench, e *engine, i int) (float64, error) {
			v, err := e.timed("run", "-d", "--name", "bench", image, "sleep", "1000")
			return then(v, err, func() error { return e.remove("bench") })
		}},
		{name: "create", target: 6, once: func(b *bench, e *engine, i int) (float64, error) {
			v, err := e.timed("create", "--name", "bench", image, "sleep", "1000")
			return then(v, err, func() error { return e.remove("bench") })
		}},
		{name: "start", target: 20, once: func(b *bench, e *engine, i int) (float64, error) {
			if err := e.do("create", "--name", "bench", image, "sleep", "1000"); err != nil {
				return 0, err
			}
			v, err := e.timed("start", "bench")
			return then(v, err, func() error { return e.remove("bench") })
		}},
		{name: "stop", target: 15, once: func(b *bench, e *engine, i int) (float64, error) {
			// The trap is set when the marker is there; before, a stop would wait for its time-out.
			script := "trap 'exit 0' TERM; touch /ready; while :; do sleep 0.01; done"
			if err := e.do("run", "-d", "--name", "bench", image, "sh", "-c", script); err != nil {
				return 0, err
			}
			for range 100 {
				if e.do("exec", "bench", "test", "-e", "/ready") == nil {
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
			v, err := e.timed("stop", "bench")
			return then(v, err, func() error { return e.remove("bench") })
		}},
		{name: "rm-f", target: 15, once: func(b *bench, e *engine, i int) (float64, error) {
			if err := e.do("run", "-d", "--name", "bench", image, "sleep", "1000"); err != nil {
				return 0, err
			}
			return e.timed(e.rm("bench")...)
		}},
		{name: "exec", target: 8, once: beside("exec", "bench-idle", "true")},
		{name: "ps", target: 5, once: beside("ps")},
		{name: "inspect", target: 5, once: beside("inspect", "bench-idle")},
		{name: "log-64MB", target: 200, rounds: 5, once: func(b *bench, e *engine, i int) (float64, error) {
			lines, err := b.lines()
			if err != nil {
				return 0, err
			}
			// The engine's default log, and a client that takes everything.
			return e.drained("run", "--rm", "--network", "none", "-v", lines+":/lines:ro", image, "dd", "if=/lines", "bs=64k")
		}},
		{name: "attach-256MB", target: 300, rounds: 5, once: func(b *bench, e *engine, i int) (float64, error) {
			return e.drained("run", "--rm", "--network", "none", "--log-driver", "none", image, "dd", "if=/dev/zero", "bs=64k", "count=4096")
		}},
		{name: "logs-tail", target: 15, rounds: 5, once: logsTail},
		{name: "idle-memory", target: 2, rounds: 3, memory: true, once: idleMemory},
	}, volumeMeasurements()...)
}

// beside times a command that looks at the container bench-idle, started for it.
func beside(args ...string) func(*bench, *engine, int) (float64, error) {
	return func(b *bench, e *engine, i int) (float64, error) {
		if i == 0 {
			if err := e.do("run", "-d", "--name", "bench-idle", image, "sleep", "100000"); err != nil {
				return 0, err
			}
		}
		v, err := e.timed(args...)
		if err != nil || i == b.rounds {
			return then(v, err, func() error { return e.remove("bench-idle") })
		}
		return v, nil
	}
}

// drained is timed with the command's output thrown away by the kernel.
func (e *engine) drained(args ...string) (float64, error) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	cmd := e.command(args...)
	cmd.Stdout = null
	began := time.Now()
	err = e.runCommand(cmd)
	return float64(time.Since(began)) / 1e6, err
}

// lines makes a file of 64 MiB of text, in lines of a hundred bytes.
func (b *bench) lines() (string, error) {
	path := filepath.Join(b.dir, "lines")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	const size = 64 << 20
	var text bytes.Buffer
	for n := 0; text.Len() < size; n++ {
		fmt.Fprintf(&text, "%-99s\n", fmt.Sprintf("2026-01-02 03:04:05 INFO request %d from 192.0.2.%d answered in %d us", n, n%251, n*7919%10007))
	}
	return path, os.WriteFile(path, text.Bytes()[:size], 0o644)
}

// logsTail times the last ten lines of a log of 64 MB, all of it in one file.
func logsTail(b *bench, e *engine, i int) (float64, error) {
	if i == 0 {
		lines, err := b.lines()
		if err != nil {
			return 0, err
		}
		if _, err := e.drained("run", "--name", "bench-log", "--network", "none", "--log-opt", "max-size=1g", "-v", lines+":/lines:ro", image, "dd", "if=/lines", "bs=64k"); err != nil {
			return 0, err
		}
	}
	v, err := e.timed("logs", "--tail", "10", "bench-log")
	if err != nil || i == min(b.rounds, 5) {
		return then(v, err, func() error { return e.remove("bench-log") })
	}
	return v, nil
}

// idleMemory starts five idle containers and returns the private memory that the engine keeps for each, in MB.
func idleMemory(b *bench, e *engine, i int) (mb float64, err error) {
	const n = 5
	ids := make([]string, 0, n)
	defer func() {
		if rerr := e.remove(ids...); rerr != nil && err == nil {
			err = rerr
		}
	}()
	for range n {
		id, err := e.output("run", "-d", image, "sleep", "1000")
		if err != nil {
			return 0, err
		}
		ids = append(ids, id)
	}
	time.Sleep(2 * time.Second) // idle: what start-up needed may be given back
	kb := 0
	for _, id := range ids {
		pids := e.helpers(id)
		if len(pids) == 0 {
			return 0, fmt.Errorf("no process found that keeps %.12s", id)
		}
		for _, pid := range pids {
			n, err := privateKB(pid)
			if err != nil {
				return 0, err
			}
			kb += n
		}
	}
	return float64(kb) / 1024 / n, nil
}

// privateKB is the memory that would be free without the process: Private_Clean and Private_Dirty of smaps_rollup, in KiB.
func privateKB(pid int) (int, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	sum := 0
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if f := strings.Fields(lines.Text()); len(f) > 1 && (f[0] == "Private_Clean:" || f[0] == "Private_Dirty:") {
			n, err := strconv.Atoi(f[1])
			if err != nil {
				return 0, err
			}
			sum += n
		}
	}
	return sum, lines.Err()
}
