package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/moby/moby/api/types/jsonstream"

	"conex/internal/engine"
)

// pulling are the events of a small pull.
var pulling = []engine.Event{
	{ID: "latest", Action: "Pulling from library/x"},
	{ID: "abc", Action: "Pulling fs layer", Total: 10},
	{ID: "def", Action: "Already exists"},
	{ID: "abc", Action: "Downloading", Current: 1, Total: 10},
	{ID: "abc", Action: "Downloading", Current: 5, Total: 10},
	{ID: "abc", Action: "Pull complete", Current: 10, Total: 10},
	{Message: "Digest: sha256:d"},
}

func TestTransferPlain(t *testing.T) {
	var b bytes.Buffer
	a := &app{}
	p := a.pullProgress(&b, false)
	for _, ev := range pulling {
		p.event(ev)
	}
	p.result("Reference", "docker.io/library/x:latest")
	p.event(engine.Event{Message: "too late"})
	want := "latest: Pulling from library/x\nabc: Pulling fs layer\ndef: Already exists\nabc: Pull complete\nDigest: sha256:d\ndocker.io/library/x:latest\n"
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
	b.Reset()
	q := a.pullProgress(&b, true)
	q.event(engine.Event{Message: "x"})
	if b.Len() != 0 {
		t.Errorf("quiet, and yet: %s", b.String())
	}
}

// What --progress json prints is what clients of Docker's API read.
func TestTransferJSON(t *testing.T) {
	var b, errb bytes.Buffer
	a := &app{name: "conex", out: &b, err: &errb, progress: "json", errJSON: &b}
	p := a.transferProgress(a.out, false)
	now := time.Unix(1700000000, 0)
	p.view.(*jsonTransfer).now = func() time.Time { now = now.Add(time.Second); return now }
	for _, ev := range pulling {
		p.event(ev)
	}
	p.result("Reference", "x:latest")
	if code := a.report(&exitError{code: 7, err: errors.New("no \x1b[31mway")}); code != 7 {
		t.Errorf("exit code %d", code)
	}
	want := `{"id":"latest","status":"Pulling from library/x"}
{"id":"abc","status":"Pulling fs layer","progressDetail":{"current":0,"total":10}}
{"id":"def","status":"Already exists"}
{"id":"abc","status":"Downloading","progressDetail":{"current":1,"total":10}}
{"id":"abc","status":"Downloading","progressDetail":{"current":5,"total":10,"rate":4}}
{"id":"abc","status":"Pull complete","progressDetail":{"current":10,"total":10}}
{"status":"Digest: sha256:d"}
{"aux":{"Reference":"x:latest"}}
{"error":"no way","errorDetail":{"code":7,"message":"no way"}}
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
	if errb.String() != "conex: no way\n" {
		t.Errorf("for people: %q", errb.String())
	}
	dec := json.NewDecoder(&b)
	n := 0
	for ; ; n++ {
		var m jsonstream.Message
		if err := dec.Decode(&m); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if n == 4 && (m.ID != "abc" || m.Progress.Current != 5 || m.Progress.Total != 10) || n == 8 && (m.Error == nil || m.Error.Message != "no way") {
			t.Errorf("as Docker's client sees line %d: %+v", n, m)
		}
	}
	if n != 9 {
		t.Errorf("%d messages", n)
	}
}

// The JSON of a command whose progress goes to standard error is alone there.
func TestErrorJSONAlone(t *testing.T) {
	var errb bytes.Buffer
	a := &app{name: "conex", out: io.Discard, err: &errb, progress: "json", errJSON: &errb}
	a.report(errors.New("bad"))
	if want := `{"error":"bad","errorDetail":{"code":1,"message":"bad"}}` + "\n"; errb.String() != want {
		t.Errorf("%q", errb.String())
	}
}

// screen is a terminal as far as the display uses one: text, new lines, cursor up, clearing.
type screen struct {
	rows   [][]rune
	y, x   int
	hidden bool
	writes int
}

func (s *screen) Write(p []byte) (int, error) {
	s.writes++
	in := []rune(string(p))
	for i := 0; i < len(in); i++ {
		for in[i] >= ' ' && len(s.rows) <= s.y {
			s.rows = append(s.rows, nil)
		}
		switch c := in[i]; {
		case c == '\r':
			s.x = 0
		case c == '\n':
			s.y++
		case c == 0x1b:
			j := i + 2
			for in[j] < 0x40 {
				j++
			}
			switch arg := string(in[i+2 : j]); string(arg) + string(in[j]) {
			case "K":
				if s.y < len(s.rows) {
					s.rows[s.y] = s.rows[s.y][:min(s.x, len(s.rows[s.y]))]
				}
			case "J":
				s.rows = s.rows[:min(s.y, len(s.rows))]
			case "?25l", "?25h":
				s.hidden = in[j] == 'l'
			default:
				n := 0
				fmt.Sscanf(arg, "%d", &n)
				s.y = max(s.y-n, 0)
			}
			i = j
		default:
			row := s.rows[s.y]
			for len(row) <= s.x {
				row = append(row, ' ')
			}
			row[s.x] = c
			s.rows[s.y] = row
			s.x++
		}
	}
	return len(p), nil
}

func (s *screen) String() string {
	var b strings.Builder
	for _, r := range s.rows {
		b.WriteString(strings.TrimRight(string(r), " ") + "\n")
	}
	return b.String()
}

// display is a ttyTransfer without its painter on a screen of its own, with a clock that stands until it is set.
func display(cols, rows int) (*ttyTransfer, *screen, *time.Time) {
	s := &screen{}
	now := time.Unix(1700000000, 0)
	d := newTTYTransfer(s, nil)
	d.now = func() time.Time { return now }
	d.size = func() (int, int) { return cols, rows }
	d.stop = make(chan struct{})
	return d, s, &now
}

func TestTransferTTY(t *testing.T) {
	d, s, now := display(80, 24)
	step := func(ms int, evs ...engine.Event) {
		for _, ev := range evs {
			d.event(ev)
		}
		*now = now.Add(time.Duration(ms) * time.Millisecond)
		d.draw(false)
	}
	step(100, engine.Event{ID: "latest", Action: "Pulling from library/node"},
		engine.Event{ID: "a2abf6c4d29d", Action: "Already exists"},
		engine.Event{ID: "a9edb18cadd1", Action: "Pulling fs layer", Total: 31_360_000},
		engine.Event{ID: "589b7251471a", Action: "Pulling fs layer", Total: 60_000_000})
	step(0, engine.Event{ID: "a9edb18cadd1", Action: "Downloading", Total: 31_360_000}, engine.Event{ID: "589b7251471a", Action: "Waiting"})
	for i := range int64(15) {
		step(100, engine.Event{ID: "a9edb18cadd1", Action: "Downloading", Current: (i + 1) * 1e6, Total: 31_360_000})
	}
	want := `latest: Pulling from library/node
a2abf6c4d29d: Already exists
a9edb18cadd1: Downloading [=======>         ]    15MB/31.36MB    10MB/s      2s
589b7251471a: Waiting
Total                     [=>               ]    15MB/91.36MB    10MB/s      8s
`
	if got := s.String(); got != want {
		t.Errorf("in the middle:\n%s\nwant\n%s", got, want)
	}
	writes := s.writes
	d.draw(false)
	if s.writes != writes || s.hidden {
		t.Errorf("%d writes for the same picture; cursor hidden: %t", s.writes-writes, s.hidden)
	}
	// A remark while layers move stands above them.
	step(100, engine.Event{Message: "a \x1b[2Jremark"})
	if got := s.String(); got[:9] != "a remark\n" || strings.Count(got, "\n") != 6 {
		t.Errorf("after a remark:\n%s", got)
	}
	// The other layer goes on from where another process ended: these bytes have not come now.
	step(1000, engine.Event{ID: "a9edb18cadd1", Action: "Pull complete", Current: 31_360_000, Total: 31_360_000},
		engine.Event{ID: "589b7251471a", Action: "Downloading", Current: 59e6, Total: 60e6})
	step(0, engine.Event{ID: "589b7251471a", Action: "Pull complete"}, engine.Event{Message: "Digest: sha256:d"}, engine.Event{Message: "Status: done"})
	d.draw(true)
	want = `a remark
latest: Pulling from library/node
a2abf6c4d29d: Already exists
a9edb18cadd1: Pull complete
589b7251471a: Pull complete
Total 32.36MB in 2.6s, 12.4MB/s
Digest: sha256:d
Status: done
`
	if got := s.String(); got != want {
		t.Errorf("at the end:\n%s\nwant\n%s", got, want)
	}
}

// With more layers than lines those at work are shown, and the last picture has all.
func TestTransferSmallScreen(t *testing.T) {
	d, s, now := display(60, 8)
	for i := range 30 {
		d.event(engine.Event{ID: fmt.Sprintf("layer%d", i), Action: "Pulling fs layer", Total: 100})
	}
	for i := range 12 {
		d.event(engine.Event{ID: fmt.Sprintf("layer%d", i), Action: "Pull complete"})
	}
	for i := 12; i < 15; i++ {
		d.event(engine.Event{ID: fmt.Sprintf("layer%d", i), Action: "Downloading", Current: 50, Total: 100})
	}
	*now = now.Add(time.Second)
	d.draw(false)
	want := `layer12: Downloading     50B/100B         0B/s       -
layer13: Downloading     50B/100B         0B/s       -
layer14: Downloading     50B/100B         0B/s       -
layer15: Pulling fs layer
layer16: Pulling fs layer
... and 13 waiting, 12 done
Total                      1.35kB/3kB          0B/s       -
`
	if got := s.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	d.draw(true)
	if got := s.String(); strings.Count(got, "layer") != 30+15 { // "fs layer" is said 15 times
		t.Errorf("the last picture:\n%s", got)
	}
}

// No picture is wider than its terminal, however narrow that is, and a narrower one has the lines above it broken.
func TestTransferWidths(t *testing.T) {
	for cols := 1; cols < 200; cols++ {
		d, _, now := display(cols, 24)
		for i, action := range []string{"Downloading", "Extracting", "Pushing", "Waiting", "Loading layer"} {
			id := fmt.Sprintf("a9edb18cadd%d", i)
			d.event(engine.Event{ID: id, Action: action, Total: 999_949_999})
			*now = now.Add(time.Second)
			d.event(engine.Event{ID: id, Action: action, Current: 999_940_000, Total: 999_949_999})
			d.event(engine.Event{ID: id + "x", Action: action, Current: 1 << 60, Total: 1 << 40})
			d.tick(*now)
		}
		for _, l := range d.lines(cols, 24, false) {
			if n := utf8.RuneCountInString(l); n > max(cols-1, 0) {
				t.Errorf("%d columns: %q is %d wide", cols, l, n)
			}
		}
	}
	d, s, _ := display(80, 24)
	d.event(engine.Event{ID: "a9edb18cadd1", Action: "Downloading", Current: 1, Total: 100})
	d.draw(false)
	d.size = func() (int, int) { return 30, 24 }
	s.y = 3 // 66 characters on lines of 30
	d.draw(false)
	if s.y != 1 {
		t.Errorf("after the terminal became narrower the cursor is in line %d", s.y)
	}
}

func TestRate(t *testing.T) {
	var r rate
	now := time.Unix(1700000000, 0)
	tick := func(n int64) { now = now.Add(100 * time.Millisecond); r.add(now, n) }
	r.add(now, 5_000_000) // had before
	if _, ok := r.eta(1); ok || r.perSecond() != 0 {
		t.Error("a rate from one look")
	}
	n := int64(5_000_000)
	for range 5 {
		n += 100_000
		tick(n)
	}
	if got := r.perSecond(); got < 999_999 || got > 1_000_001 {
		t.Errorf("%f bytes a second after half a second of 1 MB/s", got)
	}
	if _, ok := r.eta(1_000_000); ok {
		t.Error("a guess after half a second")
	}
	for range 10 {
		n += 100_000
		tick(n)
	}
	if d, ok := r.eta(10_000_000); !ok || d.Round(time.Second) != 10*time.Second {
		t.Errorf("10 MB at 1 MB/s: %v, %t", d, ok)
	}
	// A burst does not make it jump, a stall makes it sink, and after some time it is what it is now.
	n += 1_000_000
	tick(n)
	if got := r.perSecond(); got < 1_000_000 || got > 2_000_000 {
		t.Errorf("after a burst: %f", got)
	}
	before := r.perSecond()
	for range 30 {
		tick(n)
	}
	if got := r.perSecond(); got > before/2 || got <= 0 {
		t.Errorf("after three seconds of nothing: %f, before %f", got, before)
	}
	for range 200 {
		n += 300_000
		tick(n)
	}
	if got := r.perSecond(); got < 2_900_000 || got > 3_100_000 {
		t.Errorf("in the end: %f", got)
	}
	// From the beginning again, and looks that are too near to each other.
	tick(0)
	if got := r.perSecond(); got < 0 || got > 3_100_000 {
		t.Errorf("after a new beginning: %f", got)
	}
	r.add(now, 100_000)
	r.add(now, 200_000)
	tick(300_000)
	if got := r.perSecond(); got < 2_700_000 || got > 3_300_000 {
		t.Errorf("bytes of quick looks are lost: %f", got)
	}
	for _, tt := range []struct {
		d    time.Duration
		want string
	}{{0, "0s"}, {1400 * time.Millisecond, "2s"}, {185 * time.Second, "3m05s"}, {130 * time.Minute, "2h10m"}} {
		if got := brief(tt.d); got != tt.want {
			t.Errorf("brief(%v) = %q, want %q", tt.d, got, tt.want)
		}
	}
}

// What a registry says does not reach the terminal as it is.
func TestClean(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"plain", "plain"},
		{"a\tb\r\nc", "a    bc"},
		{"\x1b[2J\x1b[31mred\x1b[0m", "red"},
		{"\x1b]0;title\a!", "0;title!"},
		{"c1\u009b31mx", "c131mx"},
		{"raw\x9b31mx", "raw?31mx"},
		{"evil\u202etxt\u2066", "eviltxt"},
		{"é 世", "é 世"},
		{"\x1b", ""},
		{"\x1b[", ""},
	} {
		if got := clean(tt.in); got != tt.want {
			t.Errorf("clean(%q) = %q, want %q", tt.in, got, tt.want)
		}
	}
}

func FuzzClean(f *testing.F) {
	f.Add("a\x1b[31mb\u009b\u202e")
	f.Fuzz(func(t *testing.T, s string) {
		for _, r := range clean(s) {
			if r < 0x20 || r >= 0x7f && r < 0xa0 || r >= 0x202a && r <= 0x202e {
				t.Fatalf("clean(%q) has %U", s, r)
			}
		}
	})
}

func TestProgressFlag(t *testing.T) {
	for _, tt := range []struct{ value, err string }{
		{"auto", ""}, {"plain", ""}, {"json", ""}, {"quiet", ""},
		{"tty", "--progress tty needs a terminal to show it on"},
		{"fancy", `must be one of "auto", "tty", "plain", "json" or "quiet"`},
	} {
		a := &app{}
		err := (&progressValue{a, io.Discard}).Set(tt.value)
		if err == nil && (tt.err != "" || a.progress != tt.value) || err != nil && err.Error() != tt.err {
			t.Errorf("--progress %s: %v, want %q", tt.value, err, tt.err)
		}
		if (a.errJSON != nil) != (tt.value == "json") {
			t.Errorf("--progress %s: errors as JSON: %v", tt.value, a.errJSON)
		}
	}
}
