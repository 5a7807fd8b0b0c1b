package network

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/portmap"

	rtnetlink "github.com/vishvananda/netlink"
)

// What hands of others do to a network shows, and looking changes nothing.
func TestSurvey(t *testing.T) {
	w := newWorld(t)
	survey := func() Survey {
		t.Helper()
		s, err := w.m.Survey(t.Context())
		check(t, err)
		return s
	}
	if s := survey(); len(s.Networks) > 0 || len(s.Faults) > 0 {
		t.Errorf("a new root: %+v", s)
	}
	if files, err := filepath.Glob(w.root.Path("networks", "*.json")); err != nil || len(files) > 0 {
		t.Errorf("looking recorded %v, %v", files, err)
	}
	a := w.attach("aaa")
	if s := survey(); len(s.Networks) != 1 || len(s.Endpoints) != 1 || len(s.Faults)+len(s.Leaked)+len(s.Foreign)+len(s.Findings) > 0 {
		t.Errorf("a network as it should be: %+v", s)
	}
	fault := func(words string) {
		t.Helper()
		if s := survey(); !strings.Contains(strings.Join(s.Faults, "; "), words) {
			t.Errorf("faults %q, want %q", s.Faults, words)
		}
	}
	table, err := w.m.table(t.Context())
	check(t, err)
	check(t, portmap.Remove(table))
	fault("nftables table conex is gone")
	check(t, portmap.Rebuild(table))

	br, err := rtnetlink.LinkByName("conex0")
	check(t, err)
	check(t, rtnetlink.LinkSetDown(br))
	fault("bridge conex0 of network bridge is down")
	check(t, rtnetlink.LinkSetUp(br))

	record := w.m.recordPath(a.ep.NetworkID, "aaa")
	b, err := os.ReadFile(record)
	check(t, err)
	check(t, os.Remove(record))
	if s := survey(); len(s.Leaked) != 1 || s.Leaked[0] != a.ep.HostInterface {
		t.Errorf("leaked %v, want %s", s.Leaked, a.ep.HostInterface)
	}
	check(t, os.WriteFile(record, b, 0o644))

	check(t, deleteLink("conex0"))
	fault("bridge conex0 of network bridge is gone")
	// The next container brings all of it back.
	w.attach("bbb")
	if s := survey(); len(s.Faults) > 0 {
		t.Errorf("faults %q", s.Faults)
	}
}
