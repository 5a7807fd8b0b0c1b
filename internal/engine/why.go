package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"conex/internal/container"
	"conex/internal/events"

	"github.com/docker/go-units"
	apic "github.com/moby/moby/api/types/container"
	mevents "github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sys/unix"
)

// Reason says why a container is as it is. Fields may be added, none changes its meaning.
type Reason struct {
	ID      string `json:"id"`
	Name    string `json:"name"`
	Image   string `json:"image"`
	Status  string `json:"status"` // Docker's word, or "removed"
	Summary string `json:"summary"`
	// ExitCode is nil for what has not ended.
	ExitCode  *int      `json:"exitCode"`
	Signal    string    `json:"signal,omitempty"`
	OOMKilled bool      `json:"oomKilled,omitempty"`
	Error     string    `json:"error,omitempty"`
	Started   time.Time `json:"started,omitzero"`
	Finished  time.Time `json:"finished,omitzero"`
	// MemoryLimit and PeakMemory are in bytes, when it was killed for lack of memory.
	MemoryLimit uint64 `json:"memoryLimit,omitempty"`
	PeakMemory  uint64 `json:"peakMemory,omitempty"`
	// EndedBy is who ended it, as far as conex was asked to.
	EndedBy       *container.Ender `json:"endedBy,omitempty"`
	RestartPolicy string           `json:"restartPolicy"`
	Restarts      int              `json:"restarts"`
	NextStart     time.Time        `json:"nextStart,omitzero"`
	Health        *apic.Health     `json:"health,omitempty"`
	// Denied is what --egress kept it from, what was tried most first.
	Denied []Denial `json:"denied,omitempty"`
	// Problems are what would keep it from starting now.
	Problems []string `json:"problems,omitempty"`
	// Log are the last lines of its output.
	Log []string `json:"log,omitempty"`
}

// whyLines is how many lines of the log a reason has, whyLine how many bytes of each.
const (
	whyLines = 10
	whyLine  = 1024
)

// Why says how a container ended, why it does not start, or how it is. One that was removed is looked for in the events.
func (e *Engine) Why(ctx context.Context, name string) (*Reason, error) {
	n, err := e.snapshot(ctx, name)
	if errors.Is(err, ErrNotFound) {
		return e.whyRemoved(ctx, name, err)
	}
	if err != nil {
		return nil, err
	}
	rec := n.Record
	r := &Reason{ID: rec.ID, Name: rec.Name, Image: rec.Image, Status: string(n.Status()), RestartPolicy: policyText(rec)}
	now := time.Now()
	x, a := n.Exit, n.Alive()
	if a != nil {
		r.Restarts, r.Started, r.Health = a.Restarts, a.Started, a.Health
		if a.Exit != nil {
			x = a.Exit
		}
	} else if x != nil {
		r.Restarts, r.Health = x.Restarts, x.Health
	}
	ended := x != nil && (a == nil || a.Status == container.Restarting)
	if ended {
		r.take(x)
	}
	var s sentences
	switch {
	case a != nil && a.Status == container.Running:
		s.running(n, a, x, now)
	case a != nil:
		s.ended(n, x, now)
		wait := "at once"
		if d := x.Next.Sub(now); d > 0 {
			wait = "in " + spoken(d.Round(time.Second))
			r.NextStart = x.Next
		}
		who := "Its restart policy (" + r.RestartPolicy + ")"
		if x.By != nil && x.By.Command == container.ByHealth {
			who = "conex"
		}
		s.add("%s starts it again %s, for the %s time; the pause doubles up to a minute, and begins anew after a run of 10 s.", who, wait, ordinal(a.Restarts))
	case x == nil:
		s.add("%s was created %s ago and has not been started.", rec.Name, spoken(now.Sub(rec.Created)))
	case x.Started.IsZero():
		s.unstarted(n, x, "has never run", now)
	case x.Unstarted:
		s.unstarted(n, x, "does not run", now)
	default:
		s.ended(n, x, now)
		s.policy(n, x)
	}
	if h := r.Health; h != nil {
		s.health(h, a != nil && a.Status == container.Running)
	}
	if a == nil {
		r.Problems = e.startProblems(ctx, rec, x)
		for _, p := range r.Problems {
			s.add("It can't start now: %s.", p)
		}
	}
	if len(rec.Options.Egress) > 0 {
		s.bounded(rec.Options.Egress)
		if r.Denied, err = e.denials(ctx, rec.ID); err != nil {
			return nil, err
		}
		s.denied(r.Denied)
	}
	r.Summary = s.String()
	r.Log = e.lastLines(ctx, rec)
	return r, nil
}

// take copies how a run ended.
func (r *Reason) take(x *container.Exit) {
	code := x.Code
	r.ExitCode, r.OOMKilled, r.Error, r.Started, r.Finished = &code, x.OOM, x.Error, x.Started, x.Finished
	r.MemoryLimit, r.PeakMemory, r.EndedBy = x.MemoryLimit, x.PeakMemory, x.By
	if x.Signal != 0 {
		r.Signal = signalName(x.Signal)
	}
}

// sentences is a paragraph on its way.
type sentences struct{ b strings.Builder }

func (s *sentences) add(format string, args ...any) {
	if s.b.Len() > 0 {
		s.b.WriteByte(' ')
	}
	fmt.Fprintf(&s.b, format, args...)
}

func (s *sentences) String() string { return s.b.String() }

func (s *sentences) running(n *container.Snapshot, a *container.State, x *container.Exit, now time.Time) {
	s.add("%s has been running for %s, as process %d.", n.Record.Name, spoken(now.Sub(a.Started)), a.Pid)
	if a.Paused {
		s.add("It is paused: all its processes stand still until `conex unpause`.")
	}
	if a.Restarts > 0 {
		who := "Its restart policy (" + policyText(n.Record) + ")"
		if n.Record.HostConfig.RestartPolicy.IsNone() && n.Record.Options.HealthOnFailure != "" {
			who = "conex, as --health-on-failure says,"
		}
		s.add("%s has started it again %s.", who, times(a.Restarts))
	}
	if x != nil && !x.Started.IsZero() {
		s.add("Its run before ended %s ago: %s.", spoken(now.Sub(x.Finished)), exitWords(x, true))
		s.cause(x)
	}
}

func (s *sentences) ended(n *container.Snapshot, x *container.Exit, now time.Time) {
	s.add("%s ended %s ago, after it had run for %s: %s.", n.Record.Name, spoken(max(0, now.Sub(x.Finished))),
		spoken(max(0, x.Finished.Sub(x.Started))), exitWords(x, !x.Started.IsZero()))
	s.cause(x)
}

// unstarted is about a start that failed.
func (s *sentences) unstarted(n *container.Snapshot, x *container.Exit, how string, now time.Time) {
	s.add("%s %s: its start %s ago failed, %s.", n.Record.Name, how, spoken(now.Sub(x.Finished)), exitWords(x, false))
	if x.Error != "" {
		s.add("The reason: %s.", strings.TrimSuffix(x.Error, "."))
	}
	s.policy(n, x)
}

// cause says who or what was behind the end of a run.
func (s *sentences) cause(x *container.Exit) {
	switch {
	case x.OOM:
		what := "The kernel killed a process in it for lack of memory"
		switch {
		case x.MemoryLimit > 0:
			what += fmt.Sprintf(": its limit is %s", units.BytesSize(float64(x.MemoryLimit)))
			if x.PeakMemory > 0 {
				what += fmt.Sprintf(", it had %s at most", units.BytesSize(float64(x.PeakMemory)))
			}
			what += " (--memory raises it)"
		case x.PeakMemory > 0:
			what += fmt.Sprintf(": the machine's, not its own limit; it had %s at most", units.BytesSize(float64(x.PeakMemory)))
		}
		s.add("%s.", what)
	case x.Error == container.MonitorDied:
		s.add("Its monitor, the conex process that keeps its output and exit code, died: somebody killed it, or the kernel did for lack of memory. conex ended what was left of the container, since nobody could have said how it ended.")
	case x.Error == container.Rebooted:
		s.add("The machine went down while it ran.")
	case x.Error != "":
		s.add("The reason: %s.", strings.TrimSuffix(x.Error, "."))
	case x.By == nil && x.Signal == int(unix.SIGKILL):
		s.add("Nobody asked conex to: somebody else on this machine sent it, or the kernel.")
	case x.By == nil && x.Signal != 0:
		s.add("Nobody asked conex to.")
	}
	if x.By != nil {
		s.add("%s", enderWords(x.By))
	}
}

// policy says why the restart policy leaves it as it is.
func (s *sentences) policy(n *container.Snapshot, x *container.Exit) {
	p := n.Record.HostConfig.RestartPolicy
	switch {
	case p.IsNone():
	case n.Desired.Stopped:
		s.add("Its restart policy (%s) does not bring back what was stopped by hand.", policyText(n.Record))
	case p.IsOnFailure() && x.Code == 0:
		s.add("Its restart policy (%s) is for failures.", policyText(n.Record))
	case p.IsOnFailure() && p.MaximumRetryCount > 0 && x.Restarts >= p.MaximumRetryCount:
		s.add("Its restart policy (%s) has started it again %s, which is all that it allows.", policyText(n.Record), times(x.Restarts))
	case n.Desired.Running:
		s.add("`conex reconcile`, which runs at boot, starts it again, as its restart policy (%s) says.", policyText(n.Record))
	}
}

func (s *sentences) health(h *apic.Health, running bool) {
	if len(h.Log) == 0 {
		if running {
			s.add("Its health check has not been made yet.")
		}
		return
	}
	last := h.Log[len(h.Log)-1]
	said := strings.TrimSpace(container.Printable(last.Output))
	if len(said) > 300 {
		said = strings.ToValidUTF8(said[:300], "") + "…"
	}
	what := "succeeded"
	if last.ExitCode != 0 {
		what = fmt.Sprintf("failed with %d", last.ExitCode)
		if last.ExitCode < 0 {
			what = "failed"
		}
	}
	if said != "" {
		what += fmt.Sprintf(" and said %q", said)
	}
	switch {
	case running:
		s.add("Its health check says %s, with %s in a row; the last %s.", h.Status, failures(h.FailingStreak), what)
	case h.FailingStreak > 0:
		s.add("Its health check had failed %s in a row; the last %s.", times(h.FailingStreak), what)
	default:
		s.add("Its last health check %s.", what)
	}
}

func failures(n int) string {
	if n == 1 {
		return "1 failure"
	}
	return strconv.Itoa(n) + " failures"
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return strconv.Itoa(n) + " times"
}

func ordinal(n int) string {
	suffix := "th"
	switch {
	case n%100 >= 11 && n%100 <= 13:
	case n%10 == 1:
		suffix = "st"
	case n%10 == 2:
		suffix = "nd"
	case n%10 == 3:
		suffix = "rd"
	}
	return strconv.Itoa(n) + suffix
}

// policyText is a restart policy as --restart takes it.
func policyText(rec *container.Record) string {
	p := rec.HostConfig.RestartPolicy
	if p.MaximumRetryCount > 0 {
		return fmt.Sprintf("%s:%d", p.Name, p.MaximumRetryCount)
	}
	if p.Name == "" {
		return "no"
	}
	return string(p.Name)
}

// startProblems looks for what would keep a container from starting now: layers that are missing, folders to bind, ports that others
// have.
func (e *Engine) startProblems(ctx context.Context, rec *container.Record, x *container.Exit) []string {
	var out []string
	if ls, err := e.Layers(); err == nil {
		for _, d := range rec.Layers {
			if _, err := ls.Stat(d); err != nil {
				out = append(out, fmt.Sprintf("the layer %s of its image is missing or damaged; `conex system check --repair` fetches it again", d))
			}
		}
	}
	for _, m := range rec.Mounts {
		if m.Type != mount.TypeBind {
			continue
		}
		if _, err := os.Stat(m.Source); err != nil {
			out = append(out, fmt.Sprintf("%s, which it mounts at %s, can't be reached (%v)", m.Source, m.Destination, errors.Unwrap(err)))
		}
	}
	if len(rec.HostConfig.PortBindings) == 0 {
		return out
	}
	wanted := map[string]bool{}
	for p, bs := range rec.HostConfig.PortBindings {
		for _, b := range bs {
			wanted[b.HostPort+"/"+string(p.Proto())] = b.HostPort != ""
		}
	}
	all, err := e.snapshots(ctx)
	if err != nil {
		return out
	}
	for _, n := range all {
		a := n.Alive()
		if a == nil || n.Record.ID == rec.ID {
			continue
		}
		for _, p := range a.Ports() {
			if wanted[strconv.Itoa(int(p.HostPort))+"/"+p.Proto] {
				out = append(out, fmt.Sprintf("port %d/%s is published by container %s", p.HostPort, p.Proto, n.Record.Name))
			}
		}
	}
	return out
}

// lastLines are the end of a container's log, as far as its driver lets it be read.
func (e *Engine) lastLines(ctx context.Context, rec *container.Record) []string {
	var b bytes.Buffer
	if err := e.Logs(ctx, LogsRequest{Container: rec.ID, Tail: whyLines, Stdout: &b, Stderr: &b}); err != nil {
		return nil // a driver that keeps nothing, above all
	}
	var out []string
	for l := range strings.Lines(b.String()) {
		l = strings.TrimRight(l, "\r\n")
		if len(l) > whyLine {
			l = strings.ToValidUTF8(l[:whyLine], "") + "…"
		}
		out = append(out, l)
	}
	return out[max(0, len(out)-whyLines):]
}

// whyRemoved finds out from the events how a container ended that is gone; missing is the error when there is none.
func (e *Engine) whyRemoved(ctx context.Context, name string, missing error) (*Reason, error) {
	var r *Reason
	name = strings.TrimPrefix(name, "/")
	kills := map[string]string{} // by container, the signal that conex sent last
	oom := map[string]bool{}
	err := events.Open(e.cfg.State).Read(ctx, events.ReadOptions{Filter: func(ev events.Event) bool {
		return ev.Type == mevents.ContainerEventType && (ev.Actor.Attributes["name"] == name || len(name) >= 4 && strings.HasPrefix(ev.Actor.ID, name))
	}}, func(ev events.Event) error {
		id := ev.Actor.ID
		switch ev.Action {
		case mevents.ActionStart:
			delete(kills, id)
			delete(oom, id)
		case mevents.ActionKill:
			kills[id] = ev.Actor.Attributes["signal"]
		case mevents.ActionOOM:
			oom[id] = true
		case mevents.ActionDie:
			code, err := strconv.Atoi(ev.Actor.Attributes["exitCode"])
			if err != nil {
				return nil
			}
			ended := time.Unix(0, ev.TimeNano).UTC()
			r = &Reason{ID: id, Name: ev.Actor.Attributes["name"], Image: ev.Actor.Attributes["image"], Status: "removed", ExitCode: &code, OOMKilled: oom[id], Finished: ended}
			if d, err := strconv.Atoi(ev.Actor.Attributes["execDuration"]); err == nil {
				r.Started = ended.Add(-time.Duration(d) * time.Second)
			}
			x := container.Exit{Code: code, OOM: oom[id], Started: r.Started, Finished: ended}
			var s sentences
			s.add("%s is removed; the events tell that it ended %s ago: %s.", r.Name, spoken(time.Since(ended)), exitWords(&x, !r.Started.IsZero()))
			s.cause(&x)
			if sig, err := strconv.Atoi(kills[id]); err == nil {
				s.add("conex was told to send %s.", signalName(sig))
			}
			r.Summary = s.String()
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if r == nil {
		return nil, missing
	}
	return r, nil
}
