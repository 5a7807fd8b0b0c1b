package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"conex/internal/build"
)

// why is a step that ran for a reason with an escape sequence in it, and one that was cached.
func why() []build.Event {
	t0 := time.Unix(1700000000, 0)
	reasons := []build.Reason{{Kind: build.ReasonFiles, Text: "a\x1b[31m\nb changed"}}
	return []build.Event{
		{Kind: build.Started, Vertex: 1, Name: "[1/2] COPY \x1b[2Jx", Time: t0, Reasons: reasons},
		{Kind: build.Output, Vertex: 1, Name: "[1/2] COPY \x1b[2Jx", Time: t0, Text: "\xff\x00\n", Reasons: reasons},
		{Kind: build.Done, Vertex: 1, Name: "[1/2] COPY \x1b[2Jx", Time: t0, Reasons: reasons},
		{Kind: build.Cached, Vertex: 2, Name: "[2/2] RUN y", Time: t0, Origin: &build.Origin{Kind: build.OriginDefinition, Build: "id", Made: t0.Add(-time.Hour), Took: 2 * time.Second}},
	}
}

func TestExplainDisplays(t *testing.T) {
	var b bytes.Buffer
	p := newPlainDisplay(&b, true)
	d := &ttyDisplay{begun: time.Unix(1700000000, 0), byID: map[int]*ttyStep{}, explain: true}
	for _, ev := range why() {
		p.event(ev)
		d.event(ev)
	}
	want := "#1 [1/2] COPY x\n#1 not cached: ab changed\n#1 0.000 \xff\x00\n#1 DONE 0.0s\n\n#2 [2/2] RUN y\n#2 from build id 1 hour ago, where it took 2.0 s\n#2 CACHED\n"
	if b.String() != want {
		t.Errorf("plain: %q, not %q", b.String(), want)
	}
	lines := strings.Join(d.lines(time.Unix(1700000001, 0), 70, 24), "\n")
	for _, l := range []string{"    not cached: ab changed", "    from build id 1 hour ago, where it took 2.0 s"} {
		if !strings.Contains(lines, l) {
			t.Errorf("%q is not in\n%s", l, lines)
		}
	}
	if strings.ContainsRune(lines, '\x1b') {
		t.Errorf("an escape character in %q", lines)
	}
}

// Every line is one JSON object, whatever names hold; counts of bytes come ten times a second at most.
func TestJSONBuild(t *testing.T) {
	var b bytes.Buffer
	j := &jsonBuild{out: &b}
	for _, ev := range why() {
		j.event(ev)
	}
	t0 := time.Unix(1700000000, 0)
	for i := range 1000 {
		j.event(build.Event{Kind: build.Progress, Vertex: 3, Time: t0.Add(time.Duration(i) * time.Millisecond), Current: int64(i), Total: 2000})
	}
	j.event(build.Event{Kind: build.Failed, Vertex: 3, Time: t0, Err: &build.StepError{File: "Dockerfile", Line: 3, Instruction: "RUN x", ExitCode: 7, Output: "o", Err: errors.New("why")}})
	j.failed(errors.New("a\nb\n"), 5)
	counts := map[string]int{}
	var last jsonEvent
	for line := range strings.Lines(b.String()) {
		last = jsonEvent{}
		if err := json.Unmarshal([]byte(line), &last); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		counts[last.Event]++
		if strings.ContainsRune(line, '\x1b') {
			t.Errorf("an escape character in %q", line)
		}
		if last.Event == "failed" && (last.Line != 3 || last.ExitCode != 7 || last.Error != "why" || last.Output != "o") {
			t.Errorf("failed: %+v", last)
		}
	}
	if counts["progress"] == 0 || counts["progress"] > 11 || counts["started"] != 1 || counts["cached"] != 1 {
		t.Errorf("events %v", counts)
	}
	if last.Event != "error" || last.Code != 5 || last.Error != "a\nb" {
		t.Errorf("last: %+v", last)
	}
}
