package cli

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"conex/internal/build"
)

func TestPlainDisplay(t *testing.T) {
	var b bytes.Buffer
	d := newPlainDisplay(&b, false)
	t0 := time.Unix(1700000000, 0)
	at := func(ms int) time.Time { return t0.Add(time.Duration(ms) * time.Millisecond) }
	for _, ev := range []build.Event{
		{Kind: build.Queued, Vertex: 1, Name: "[1/2] FROM x", Time: at(0)},
		{Kind: build.Queued, Vertex: 2, Name: "[2/2] RUN y\nmore of it", Time: at(0)},
		{Kind: build.Cached, Vertex: 1, Name: "[1/2] FROM x", Time: at(1)},
		{Kind: build.Started, Vertex: 2, Name: "[2/2] RUN y\nmore of it", Time: at(100)},
		{Kind: build.Output, Vertex: 2, Name: "[2/2] RUN y\nmore of it", Text: "one\ntwo", Time: at(412)},
		{Kind: build.Output, Vertex: 2, Name: "[2/2] RUN y\nmore of it", Text: "oops\n", Stderr: true, Time: at(413)},
		{Kind: build.Output, Vertex: 2, Name: "[2/2] RUN y\nmore of it", Text: " halves\n10%\r20%\n", Time: at(500)},
		{Kind: build.Output, Vertex: 2, Name: "[2/2] RUN y\nmore of it", Text: "no newline", Time: at(600)},
		{Kind: build.Warning, Text: "look here", Time: at(600)},
		{Kind: build.Started, Vertex: 3, Name: "[other 1/1] RUN z", Time: at(700)},
		{Kind: build.Failed, Vertex: 3, Name: "[other 1/1] RUN z", Err: errors.New("why\nand how"), Time: at(800), Duration: time.Second},
		{Kind: build.Done, Vertex: 2, Name: "[2/2] RUN y\nmore of it", Time: at(1100), Duration: time.Second, Text: "sha256:abc"},
	} {
		d.event(ev)
	}
	want := `#1 [1/2] FROM x
#1 CACHED

#2 [2/2] RUN y
#2 0.312 one
#2 0.313 oops
#2 0.400 two halves
#2 0.400 20%
WARNING: look here

#3 [other 1/1] RUN z
#3 ERROR: why

#2 [2/2] RUN y
#2 1.000 no newline
#2 sha256:abc
#2 DONE 1.0s
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

func TestTTYDisplayLines(t *testing.T) {
	t0 := time.Unix(1700000000, 0)
	d := &ttyDisplay{begun: t0, byID: map[int]*ttyStep{}}
	d.event(build.Event{Kind: build.Queued, Vertex: 1, Name: "[1/3] FROM x"})
	d.event(build.Event{Kind: build.Queued, Vertex: 2, Name: "[2/3] RUN make"})
	d.event(build.Event{Kind: build.Queued, Vertex: 3, Name: "[3/3] RUN test"})
	d.event(build.Event{Kind: build.Cached, Vertex: 1, Name: "[1/3] FROM x"})
	d.event(build.Event{Kind: build.Started, Vertex: 2, Name: "[2/3] RUN make", Time: t0.Add(time.Second)})
	d.event(build.Event{Kind: build.Output, Vertex: 2, Name: "[2/3] RUN make", Text: "a\nb\x1b[31mred\x1b[0m\n10%\r20%"})
	got := d.lines(t0.Add(3*time.Second), 40, 24)
	want := []string{
		"[+] Building 3.0s (1/3)",
		" => CACHED [1/3] FROM x            0.0s",
		" => [2/3] RUN make                 2.0s",
		" => => a",
		" => => bred",
		" => => 20%",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	// A small screen keeps the last lines; nothing is wider than it.
	got = d.lines(t0.Add(3*time.Second), 20, 4)
	if len(got) != 3 || got[2] != " => => 20%" {
		t.Errorf("small screen: %q", got)
	}
	for _, l := range got {
		if n := len([]rune(l)); n > 19 {
			t.Errorf("%q is %d wide", l, n)
		}
	}
	d.event(build.Event{Kind: build.Done, Vertex: 2, Name: "[2/3] RUN make", Duration: 4 * time.Second})
	d.event(build.Event{Kind: build.Canceled, Vertex: 3, Name: "[3/3] RUN test"})
	d.ended = true
	last := strings.Join(d.lines(t0.Add(5*time.Second), 40, 24), "\n")
	if !strings.HasPrefix(last, "[+] Building 5.0s (3/3) FINISHED\n") || strings.Contains(last, "20%") || !strings.Contains(last, "CANCELED [3/3]") {
		t.Errorf("at the end:\n%s", last)
	}
}

func TestEllipsis(t *testing.T) {
	for _, tt := range []struct {
		in   string
		n    int
		want string
	}{{"abc", 3, "abc"}, {"abcd", 3, "ab…"}, {"äöüß", 3, "äö…"}, {"abc", 1, "a"}, {"", 0, ""}} {
		if got := ellipsis(tt.in, tt.n); got != tt.want {
			t.Errorf("ellipsis(%q, %d) = %q, want %q", tt.in, tt.n, got, tt.want)
		}
	}
}
