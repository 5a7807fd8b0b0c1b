package containers

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestShortIDOfDigits(t *testing.T) {
	n := &normal{}
	long := "661992244161" + strings.Repeat("b", 52)
	if got := n.line("661992244161"); got != "661992244161" {
		t.Errorf("a number, as far as is known: %q", got)
	}
	// The whole one comes later, as where a container says its host name before inspect says its id.
	n.see(answer{out: [2][]string{{"661992244161"}}})
	n.see(answer{out: [2][]string{1: {"the id is " + long}}})
	if got := n.line("661992244161"); got != "<id1>" {
		t.Errorf("the short form of an id: %q", got)
	}
	if got := n.line(long); got != "<id1>" {
		t.Errorf("an id: %q", got)
	}
}

// What a command leaves in the background does not do anything in the next case.
func TestBackgroundEnds(t *testing.T) {
	p := Place{Env: os.Environ(), Start: (*exec.Cmd).Start}
	answers, err := p.Run(t.Context(), &Case{Steps: []Step{{Line: "sleep 1000 & echo $!"}, {Line: "exit 3"}}}, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if len(answers) != 2 || len(answers[0]) != 1 || !slices.Equal(answers[1], []string{"= 3"}) {
		t.Fatalf("%q", answers)
	}
	pid := strings.TrimPrefix(answers[0][0], "| ")
	for range 10_000 {
		cmdline, err := os.ReadFile("/proc/" + pid + "/cmdline")
		if err != nil || !strings.HasPrefix(string(cmdline), "sleep\x001000") {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Errorf("process %s is still there", pid)
}
