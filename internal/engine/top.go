package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"conex/internal/control"
	"conex/internal/linux/slack"
)

// Top lists a container's processes with the host's process ids. Without psArgs, or with "-ef", conex reads /proc itself; other
// arguments go to the host's ps.
func (e *Engine) Top(ctx context.Context, name string, psArgs []string) (titles []string, rows [][]string, err error) {
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	if n.Alive() == nil {
		return nil, nil, conflict("container %s is not running", n.Record.ID)
	}
	pids, err := e.client(n.Record.ID).Top(ctx)
	if errors.Is(err, control.ErrGone) {
		return nil, nil, errors.Join(e.settleGone(ctx, n.Record.ID), conflict("container %s is not running", n.Record.ID))
	}
	if err != nil {
		return nil, nil, err
	}
	e.event(n.Record, "top", nil)
	slices.Sort(pids)
	if len(psArgs) > 0 && !slices.Equal(psArgs, []string{"-ef"}) {
		return hostPS(ctx, psArgs, pids)
	}
	titles = []string{"UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"}
	boot, err := bootTime()
	if err != nil {
		return nil, nil, err
	}
	for _, pid := range pids {
		row, err := processRow(pid, boot)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, errGone) {
			continue // ended meanwhile
		}
		if err != nil {
			return nil, nil, err
		}
		rows = append(rows, row)
	}
	return titles, rows, nil
}

var errGone = errors.New("process is gone")

// clockTicks is the kernel's unit in /proc: USER_HZ, 100 on all of Linux's architectures but one that conex doesn't run on.
const clockTicks = 100

// processRow reads one process (proc_pid_stat(5)).
func processRow(pid int, boot time.Time) ([]string, error) {
	dir := "/proc/" + strconv.Itoa(pid)
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return nil, errGone
	}
	// The command's name, in parentheses, may hold anything.
	end := bytes.LastIndexByte(b, ')')
	start := bytes.IndexByte(b, '(')
	f := strings.Fields(string(b[end+1:]))
	if end < 0 || start < 0 || len(f) < 20 {
		return nil, fmt.Errorf("read %s/stat: unknown format", dir)
	}
	num := func(field int) int64 { // numbered as in the manual page, from 1
		v, _ := strconv.ParseInt(f[field-3], 10, 64)
		return v
	}
	cpu := num(14) + num(15)
	started := boot.Add(time.Duration(num(22)) * time.Second / clockTicks)
	age := max(1, int64(time.Since(started)/time.Second))
	cmd := strings.TrimRight(strings.ReplaceAll(readText(dir+"/cmdline"), "\x00", " "), " ")
	if cmd == "" {
		cmd = "[" + string(b[start+1:end]) + "]"
	}
	stime := started.Local().Format("15:04")
	if time.Since(started) > 24*time.Hour {
		stime = started.Local().Format("Jan02")
	}
	s := cpu / clockTicks
	return []string{
		owner(dir), strconv.Itoa(pid), f[1], strconv.FormatInt(min(99, s*100/age), 10), stime, ttyName(num(7)),
		fmt.Sprintf("%02d:%02d:%02d", s/3600, s/60%60, s%60), cmd,
	}, nil
}

func readText(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(b)
}

// owner is the process's user by the host's passwd, as ps shows it.
func owner(dir string) string {
	for line := range strings.Lines(readText(dir + "/status")) {
		if rest, ok := strings.CutPrefix(line, "Uid:"); ok {
			if f := strings.Fields(rest); len(f) > 1 {
				if u, err := user.LookupId(f[1]); err == nil {
					return u.Username
				}
				return f[1]
			}
		}
	}
	return "?"
}

func ttyName(nr int64) string {
	major, minor := nr>>8&0xfff, nr&0xff|nr>>12&0xfff00
	switch {
	case nr == 0:
		return "?"
	case major >= 136 && major <= 143:
		return "pts/" + strconv.FormatInt((major-136)<<8+minor, 10)
	case major == 4:
		return "tty" + strconv.FormatInt(minor, 10)
	default:
		return "?"
	}
}

func bootTime() (time.Time, error) {
	for line := range strings.Lines(readText("/proc/stat")) {
		if rest, ok := strings.CutPrefix(line, "btime "); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(rest), 10, 64)
			if err != nil {
				return time.Time{}, fmt.Errorf("read /proc/stat: %w", err)
			}
			return time.Unix(n, 0), nil
		}
	}
	return time.Time{}, errors.New("read /proc/stat: no btime")
}

// hostPS runs the host's ps and keeps the lines of pids.
func hostPS(ctx context.Context, args []string, pids []int) ([]string, [][]string, error) {
	var out []byte
	err := slack.Run(func() (err error) {
		out, err = exec.CommandContext(ctx, "ps", args...).Output()
		return err
	})
	if err != nil {
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			return nil, nil, invalid("ps: %s", strings.TrimSpace(string(ee.Stderr)))
		}
		return nil, nil, fmt.Errorf("run the host's ps, which other arguments than -ef need: %w", err)
	}
	lines := strings.Split(strings.TrimRight(string(out), "\n"), "\n")
	titles := strings.Fields(lines[0])
	col := slices.Index(titles, "PID")
	if col < 0 {
		return nil, nil, invalid("Couldn't find PID field in ps output")
	}
	var rows [][]string
	for _, l := range lines[1:] {
		f := strings.Fields(l)
		if len(f) <= col {
			continue
		}
		pid, err := strconv.Atoi(f[col])
		if err != nil || !slices.Contains(pids, pid) {
			continue
		}
		if len(f) > len(titles) { // the last column is the command with its blanks
			f = append(f[:len(titles)-1:len(titles)-1], strings.Join(f[len(titles)-1:], " "))
		}
		rows = append(rows, f)
	}
	return titles, rows, nil
}
