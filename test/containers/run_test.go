package containers

import (
	"strings"
	"testing"
)

func TestShortIDOfDigits(t *testing.T) {
	n := &normal{}
	long := "661992244161" + strings.Repeat("b", 52)
	if got := n.line("661992244161"); got != "661992244161" {
		t.Errorf("a number, as far as is known: %q", got)
	}
	if got := n.line(long); got != "<id1>" {
		t.Errorf("an id: %q", got)
	}
	if got := n.line("661992244161"); got != "<id1>" {
		t.Errorf("the short form of an id that was seen: %q", got)
	}
}
