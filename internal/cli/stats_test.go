package cli

import (
	"bytes"
	"testing"

	"conex/internal/engine"
)

func TestStatsRow(t *testing.T) {
	r := newStatsRow(&engine.ContainerStats{
		Asked: "w\x1b[31meb", ID: "0123456789abcdef", Name: "web", CPU: 12.345, Memory: 32 << 20, MemoryLimit: 64 << 20,
		NetRx: 1500, NetTx: 2_500_000, BlockRead: 4096, BlockWrite: 0, Pids: 3,
	}, true)
	want := statsRow{
		BlockIO: "4.1kB / 0B", CPUPerc: "12.35%", Container: `w\x1b[31meb`, ID: "0123456789ab", MemPerc: "50.00%", MemUsage: "32MiB / 64MiB",
		Name: "web", NetIO: "1.5kB / 2.5MB", PIDs: "3",
	}
	want.Container = clean("w\x1b[31meb")
	if r != want || bytes.ContainsRune([]byte(r.Container), 0x1b) {
		t.Errorf("got  %+q\nwant %+q", r, want)
	}
	if r := newStatsRow(&engine.ContainerStats{Name: "stopped"}, true); r.MemUsage != "0B / 0B" || r.CPUPerc != "0.00%" || r.PIDs != "0" {
		t.Errorf("a stopped one: %+v", r)
	}
}

// TestRepaint wants a shorter text to leave nothing of a longer one.
func TestRepaint(t *testing.T) {
	var b bytes.Buffer
	p := &repaint{out: &b}
	for _, text := range []string{"one\ntwo\n", "x\n"} {
		if n, err := p.Write([]byte(text)); n != len(text) || err != nil {
			t.Error(n, err)
		}
	}
	if want := "\x1b[2J\x1b[Hone\x1b[K\ntwo\x1b[K\n\x1b[J\x1b[Hx\x1b[K\n\x1b[J"; b.String() != want {
		t.Errorf("got %q", b.String())
	}
}
