package monitor_test

import (
	"testing"

	"conex/internal/engine"

	apic "github.com/moby/moby/api/types/container"
)

// TestKillRestarting kills a container that ends and begins again all the time: whenever the signal comes, the container stays ended and nobody
// is told that it did not run.
func TestKillRestarting(t *testing.T) {
	w := newWorld(t)
	r := request("true")
	r.HostConfig.RestartPolicy.Name = apic.RestartPolicyAlways
	id := w.detached(r)
	for i := range 60 {
		if err := w.Kill(t.Context(), id, ""); err != nil {
			t.Fatalf("kill %d: %v", i, err)
		}
		w.eventually("it goes on", func() bool { return w.status(id) == string(apic.StateExited) })
		if _, err := w.Start(t.Context(), engine.StartRequest{Container: id}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.RemoveContainer(t.Context(), engine.RemoveRequest{Container: id, Force: true}); err != nil {
		t.Fatal(err)
	}
}
