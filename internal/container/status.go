package container

import (
	"fmt"
	"time"

	"conex/internal/disk"

	"github.com/docker/go-units"
	apic "github.com/moby/moby/api/types/container"
)

// Snapshot is all that the disk says about one container at one moment.
type Snapshot struct {
	Record  *Record
	Desired Desired
	Exit    *Exit
	State   *State
	// Lost says that nobody saw the end of the last run: the machine went down, or somebody emptied the state folder. Exit says so then,
	// exit.json does not.
	Lost bool
}

// Snapshot reads everything about a container. ErrNotFound when it is gone.
func (s *Store) Snapshot(id string) (*Snapshot, error) { return s.snapshot(id, s.Load) }

func (s *Store) snapshot(id string, load func(id string) (*Record, error)) (*Snapshot, error) {
	// The state first: a monitor that ends writes exit.json before it changes the state, so that no reader finds neither.
	st, err := s.State(id)
	if err != nil {
		return nil, err
	}
	r, err := load(id)
	if err != nil {
		return nil, err
	}
	d, err := s.Desired(id)
	if err != nil {
		return nil, err
	}
	e, err := s.Exit(id)
	if err != nil {
		return nil, err
	}
	if st != nil && st.Status == Exited && st.Exit != nil && (e == nil || e.Finished.Before(st.Exit.Finished)) {
		e = st.Exit // the disk had no room for it
	}
	n := &Snapshot{Record: r, Desired: d, Exit: e, State: st}
	if st == nil && d.Running && !d.Since.IsZero() && (e == nil || e.Finished.Before(d.Since) || !e.Next.IsZero()) {
		// Unless it was just started, between our looks.
		if n.State, err = s.State(id); err == nil && n.State == nil {
			n.lose()
		}
	}
	return n, err
}

// Errors of ends that nobody saw, as exit.json and inspect have them.
const (
	MonitorDied = "monitor died"
	Rebooted    = "machine rebooted"
)

// LostCode is the exit code of a run whose end nobody saw: Docker's.
const LostCode = 255

// lose makes up the end of a run that nobody saw.
func (n *Snapshot) lose() {
	x := &Exit{Code: LostCode, Error: Rebooted, Started: n.Desired.Since, Finished: n.Desired.Since}
	if n.Exit != nil {
		x.Restarts = n.Exit.Restarts
		if !n.Exit.Next.IsZero() { // a restart later than that
			x.Started, x.Finished = n.Exit.Next, n.Exit.Next
		}
	}
	n.Exit, n.Lost = x, true
}

// Alive returns the state of a container that runs or is about to be restarted, nil otherwise. It trusts the file: settle dead
// monitors before.
func (n *Snapshot) Alive() *State {
	if n.State != nil && n.State.BootID == disk.BootID() && (n.State.Status == Running || n.State.Status == Restarting) {
		return n.State
	}
	return nil
}

// Stoppable reports whether there is something to end: the container is alive, or a monitor is just starting it.
func (n *Snapshot) Stoppable() bool {
	return n.Alive() != nil || n.State != nil && n.State.BootID == disk.BootID() && n.State.Status == Starting && n.State.Monitor != 0
}

// Status returns Docker's word for the container's state: created, running, paused, restarting, exited.
func (n *Snapshot) Status() apic.ContainerState {
	if a := n.Alive(); a != nil {
		if a.Paused {
			return apic.StatePaused
		}
		return apic.ContainerState(a.Status)
	}
	if n.Exit == nil || n.Exit.Started.IsZero() {
		return apic.StateCreated
	}
	return apic.StateExited
}

// StatusText returns what `ps` shows: "Up 5 seconds (healthy)", "Exited (0) 3 minutes ago".
func (n *Snapshot) StatusText(now time.Time) string {
	a := n.Alive()
	switch {
	case a != nil && a.Status == Restarting:
		code, at := 0, now
		if a.Exit != nil {
			code, at = a.Exit.Code, a.Exit.Finished
		}
		return fmt.Sprintf("Restarting (%d) %s ago", code, ago(now, at))
	case a != nil:
		s := "Up " + ago(now, a.Started)
		if a.Paused {
			return s + " (Paused)"
		}
		if a.Health != nil {
			switch a.Health.Status {
			case apic.Starting:
				s += " (health: starting)"
			case apic.Healthy, apic.Unhealthy:
				s += " (" + string(a.Health.Status) + ")"
			}
		}
		return s
	case n.Exit == nil || n.Exit.Started.IsZero():
		return "Created"
	default:
		return fmt.Sprintf("Exited (%d) %s ago", n.Exit.Code, ago(now, n.Exit.Finished))
	}
}

func ago(now, t time.Time) string { return units.HumanDuration(max(0, now.Sub(t))) }
