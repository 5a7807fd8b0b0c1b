package build

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"conex/internal/disk"

	"golang.org/x/sys/unix"
)

// Bounds of what is kept of a step's output: its begin and its end.
const (
	logHead   = 1 << 20
	logTail   = 1 << 20
	entryCost = 64 // of an entry that waits in memory, besides its text
)

// LogEntry is a piece of what a step printed.
type LogEntry struct {
	// Vertex is the step's number, Time when it printed Text, in seconds since the build began.
	Vertex int     `json:"vertex"`
	Time   float64 `json:"time"`
	Stderr bool    `json:"stderr,omitempty"`
	Text   string  `json:"text"`
	// Skipped counts the bytes of the step's output before this that were not kept.
	Skipped int64 `json:"skipped,omitempty"`
}

// stepLog keeps what the steps of a build print: a file without a name, of JSON lines, until link gives it one. The order of a step's
// entries is that in which they came; among steps their times tell. It is used under the journal's lock.
type stepLog struct {
	dir   string
	began time.Time
	file  *os.File
	w     *bufio.Writer
	steps map[int]*loggedStep
	// hidden are lines of secrets, of which the log has stars.
	hidden []string
	err    error // the first; nothing is kept from then on
}

// loggedStep is what is held back of one step.
type loggedStep struct {
	head int // bytes written
	// tail are the last entries, of tailed bytes; skipped were dropped before them.
	tail    []LogEntry
	tailed  int
	skipped int64
}

func newStepLog(root *disk.Root, began time.Time) *stepLog {
	return &stepLog{dir: root.Path("staging"), began: began, steps: map[int]*loggedStep{}}
}

// add keeps a piece of output.
func (l *stepLog) add(ev *Event) {
	if l == nil || l.err != nil || ev.Text == "" {
		return
	}
	s := l.steps[ev.Vertex]
	if s == nil {
		s = &loggedStep{}
		l.steps[ev.Vertex] = s
	}
	text := ev.Text
	for _, h := range l.hidden {
		text = strings.ReplaceAll(text, h, "***")
	}
	e := LogEntry{Vertex: ev.Vertex, Time: ev.Time.Sub(l.began).Seconds(), Stderr: ev.Stderr, Text: text}
	if s.head+len(e.Text) <= logHead && s.tail == nil {
		s.head += len(e.Text)
		l.err = l.write(&e)
		return
	}
	s.tail = append(s.tail, e)
	s.tailed += len(e.Text) + entryCost
	drop := 0
	for ; s.tailed > logTail && drop < len(s.tail)-1; drop++ {
		s.tailed -= len(s.tail[drop].Text) + entryCost
		s.skipped += int64(len(s.tail[drop].Text))
	}
	if drop > 0 && (drop > len(s.tail)/2 || cap(s.tail) > 2*len(s.tail)) {
		s.tail = append([]LogEntry(nil), s.tail[drop:]...)
	} else {
		s.tail = s.tail[drop:]
	}
}

// hide keeps a secret that a step prints out of the log, line by line. Lines of few letters stand in too many words.
func (l *stepLog) hide(secret []byte) {
	if l == nil {
		return
	}
	for line := range strings.Lines(string(secret)) {
		if line = strings.TrimSpace(line); len(line) >= 5 && !slices.Contains(l.hidden, line) {
			l.hidden = append(l.hidden, line)
		}
	}
}

// end writes what was held back of a step.
func (l *stepLog) end(vertex int) {
	if l == nil || l.err != nil {
		return
	}
	s := l.steps[vertex]
	if s == nil {
		return
	}
	for i := range s.tail {
		if i == 0 {
			s.tail[i].Skipped = s.skipped
		}
		if l.err = l.write(&s.tail[i]); l.err != nil {
			return
		}
	}
	delete(l.steps, vertex)
}

func (l *stepLog) write(e *LogEntry) error {
	if l.file == nil {
		fd, err := unix.Open(l.dir, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return &fs.PathError{Op: "open", Path: l.dir, Err: err}
		}
		l.file = os.NewFile(uintptr(fd), "log")
		l.w = bufio.NewWriterSize(l.file, 32<<10)
	}
	b, err := json.Marshal(e)
	if err == nil {
		_, err = l.w.Write(append(b, '\n'))
	}
	return err
}

// finish writes what is held back.
func (l *stepLog) finish() error {
	for v := range l.steps {
		l.end(v)
	}
	if l.err == nil && l.w != nil {
		l.err = l.w.Flush()
	}
	return l.err
}

// empty says that nothing was printed.
func (l *stepLog) empty() bool { return l.file == nil }

// link gives the file its name.
func (l *stepLog) link(path string) error {
	if err := unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(int(l.file.Fd())), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW); err != nil {
		return &os.LinkError{Op: "link", Old: "log", New: path, Err: err}
	}
	return nil
}

func (l *stepLog) close() error {
	if l.file == nil {
		return nil
	}
	return l.file.Close()
}

// Log returns what the steps of a build printed, or one of them if vertex is not 0, by time.
func (h *History) Log(r *BuildRecord, vertex int) ([]LogEntry, error) {
	f, err := os.Open(h.root.Path("builds", r.Project, r.ID, "log"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("build log: %w", err)
	}
	defer f.Close()
	var list []LogEntry
	for d := json.NewDecoder(bufio.NewReader(f)); ; {
		var e LogEntry
		err := d.Decode(&e)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("build log of %s is damaged: %w", r.ID, err)
		}
		if vertex == 0 || e.Vertex == vertex {
			list = append(list, e)
		}
	}
	slices.SortStableFunc(list, func(a, b LogEntry) int {
		switch {
		case a.Time < b.Time:
			return -1
		case a.Time > b.Time:
			return 1
		}
		return 0
	})
	return list, nil
}

// Replay makes the events of a build of its record and log again, by time; of one step alone if s is not nil.
func (r *BuildRecord) Replay(s *StepRecord, entries []LogEntry) []Event {
	var list []Event
	names := map[int]*StepRecord{}
	for i := range r.Steps {
		st := &r.Steps[i]
		names[st.Vertex] = st
		if s != nil && s.Vertex != st.Vertex || st.Ended.IsZero() && st.Started.IsZero() {
			continue
		}
		ev := Event{Vertex: st.Vertex, Name: st.Name, Stage: st.Stage, Reasons: st.Reasons, Origin: st.Origin, Time: st.Started}
		if !st.Started.IsZero() {
			ev.Kind = Started
			list = append(list, ev)
		}
		ev.Time, ev.Duration, ev.Text = st.Ended, st.Took, st.Text
		switch st.Outcome {
		case OutcomeCached, OutcomeUnneeded:
			ev.Kind = Cached
		case OutcomeFailed:
			ev.Kind, ev.Err = Failed, errors.New(st.Error)
		case OutcomeCanceled:
			ev.Kind = Canceled
		default:
			ev.Kind = Done
		}
		list = append(list, ev)
	}
	for _, e := range entries {
		st := names[e.Vertex]
		if st == nil {
			continue
		}
		ev := Event{Kind: Output, Vertex: e.Vertex, Name: st.Name, Stage: st.Stage, Stderr: e.Stderr, Text: e.Text}
		ev.Time = r.Started.Add(time.Duration(e.Time * float64(time.Second)))
		if ev.Time.Before(st.Started) { // by rounding
			ev.Time = st.Started
		}
		if !st.Ended.IsZero() && ev.Time.After(st.Ended) {
			ev.Time = st.Ended
		}
		if e.Skipped > 0 {
			ev.Text = fmt.Sprintf("[%d bytes left out]\n", e.Skipped) + ev.Text
		}
		list = append(list, ev)
	}
	rank := func(ev Event) int {
		switch ev.Kind {
		case Started:
			return 0
		case Output:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(list, func(a, b Event) int {
		return cmp.Or(a.Time.Compare(b.Time), rank(a)-rank(b))
	})
	return list
}
