package network

import (
	"fmt"
	"testing"
)

// TestLastOwner gives a container the address of one that is gone, whose network namespace the kernel has not taken down yet: it is still on
// the bridge, and still talks. Whoever asks for the address reaches the new one.
func TestLastOwner(t *testing.T) {
	w := newWorld(t)
	asker := w.attach("ccc")
	asker.serve(90)
	last := w.attach("aaa")
	check(t, w.m.Detach(t.Context(), "aaa"))
	next := w.attach("bbb")
	if next.ep.Address != last.ep.Address || next.ep.MAC != last.ep.MAC {
		t.Fatalf("%s %s, the last one had %s %s: this test needs the same", next.ep.Address, next.ep.MAC, last.ep.Address, last.ep.MAC)
	}
	next.serve(80)
	for i := range 2 {
		if _, err := ask(last.ns, "udp", fmt.Sprintf("%s:90", asker.ep.Address.Addr())); err == nil {
			t.Error("the last owner is answered")
		}
		if from, err := ask(asker.ns, "tcp", fmt.Sprintf("%s:80", next.ep.Address.Addr())); err != nil || from != asker.ep.Address.Addr().String() {
			t.Errorf("attempt %d: %q, %v", i, from, err)
		}
	}
}
