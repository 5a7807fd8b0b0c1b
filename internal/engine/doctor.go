package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"conex/internal/config"
	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/doctor"
	"conex/internal/network"
	"conex/internal/resolver"
)

// Diagnosis is what Doctor found.
type Diagnosis struct {
	Results []doctor.Result `json:"results"`
	// OK, Degraded, Broken and Unknown count them.
	OK       int `json:"ok"`
	Degraded int `json:"degraded"`
	Broken   int `json:"broken"`
	Unknown  int `json:"unknown"`
}

// Doctor looks at the machine and at the installation that cfg names, if there is one. It needs no engine: nothing is made, settled or
// changed, and what this user may not see is said to be unknown.
func Doctor(ctx context.Context, cfg *config.Config) Diagnosis {
	h := &doctor.Host{Config: cfg, ResolvConf: resolver.HostFile, Nameserver: 53}
	d := Diagnosis{Results: h.Look(ctx)}
	root, err := disk.LookRoot(cfg.Root)
	for _, c := range []struct {
		name string
		look func(context.Context, *config.Config, *disk.Root, *doctor.Result)
	}{{"containers", doctorContainers}, {"networks", doctorNetworks}, {"leftovers", doctorLeftovers}, {"reconcile", doctorReconcile}} {
		r := doctor.Result{Check: c.name, Level: doctor.OK}
		switch {
		case err == nil:
			c.look(ctx, cfg, root, &r)
		case errors.Is(err, fs.ErrNotExist):
			r.Found = "none yet"
		case errors.Is(err, fs.ErrPermission):
			r.Worse(doctor.Unknown, "takes root to see", "sudo conex doctor")
		default:
			r.Worse(doctor.Broken, err.Error(), "")
		}
		d.Results = append(d.Results, r)
	}
	for _, r := range d.Results {
		switch r.Level {
		case doctor.OK:
			d.OK++
		case doctor.Degraded:
			d.Degraded++
		case doctor.Broken:
			d.Broken++
		default:
			d.Unknown++
		}
	}
	return d
}

// failed notes an error of a look.
func failed(r *doctor.Result, err error) {
	if errors.Is(err, fs.ErrPermission) {
		r.Worse(doctor.Unknown, "takes root to see", "sudo conex doctor")
		return
	}
	r.Worse(doctor.Unknown, "could not be looked at: "+err.Error(), "")
}

// doctorContainers looks for monitors that died and that nobody has settled yet.
func doctorContainers(_ context.Context, cfg *config.Config, root *disk.Root, r *doctor.Result) {
	cs := container.Open(root, cfg.State)
	ids, err := cs.List()
	if err != nil {
		failed(r, err)
		return
	}
	running := 0
	var dead []string
	run, err := cs.ListRun()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		failed(r, err)
		return
	}
	for _, id := range run {
		st, err := cs.State(id)
		switch {
		case err != nil:
			failed(r, err)
		case cs.Watched(id):
			running++
		case st != nil:
			name := id[:12]
			if rec, err := cs.Load(id); err == nil {
				name = rec.Name
			}
			dead = append(dead, name)
		}
	}
	r.Found = fmt.Sprintf("%d, %d of them with a monitor", len(ids), running)
	if len(dead) > 0 {
		r.Worse(doctor.Degraded, "the monitor died of "+strings.Join(dead, ", "), "the next command settles it (conex ps), `conex why` says how it ended")
	}
}

func doctorNetworks(ctx context.Context, cfg *config.Config, root *disk.Root, r *doctor.Result) {
	if os.Geteuid() != 0 {
		r.Worse(doctor.Unknown, "takes root to see", "sudo conex doctor")
		return
	}
	s, err := network.Open(root, cfg.State).Survey(ctx)
	if err != nil {
		failed(r, err)
		return
	}
	r.Found = fmt.Sprintf("%d with a bridge, %d endpoints", len(s.Networks), len(s.Endpoints))
	for _, i := range s.Networks {
		r.Note("network %s is bridge %s", i.Name, i.Interface)
	}
	for _, f := range s.Faults {
		r.Worse(doctor.Broken, f, "conex network repair")
	}
	for _, f := range s.Findings {
		if f.What != "" && len(s.Endpoints) > 0 {
			r.Worse(doctor.Broken, f.What, f.Hint)
		} else {
			r.Worse(doctor.Degraded, f.What, f.Hint)
		}
	}
	if len(s.Leaked) > 0 {
		r.Worse(doctor.Degraded, "what no container has is left: "+strings.Join(s.Leaked, ", "), "a process may hold a namespace open; ip link del NAME, nft delete table netdev conex-NAME")
	}
	for _, f := range s.Foreign {
		r.Note("bridge %s is no network's of this root", f)
	}
	cs := container.Open(root, cfg.State)
	for _, ep := range s.Endpoints {
		if len(ep.ContainerID) == 64 && !cs.Watched(ep.ContainerID) && !disk.Held(cfg.State+"/build/"+ep.ContainerID+".lock") {
			r.Worse(doctor.Degraded, "an address of a container that does not run is still taken: "+ep.ContainerName, "conex ps, which settles it")
		}
	}
}

func doctorLeftovers(_ context.Context, _ *config.Config, root *disk.Root, r *doctor.Result) {
	left, err := root.Leftovers()
	if err != nil {
		failed(r, err)
		return
	}
	if len(left) == 0 {
		r.Found = "nothing of processes that died"
		return
	}
	r.Found = fmt.Sprintf("%d entries of processes that died; the next pull, build or prune sweeps them", len(left))
	for _, l := range left {
		r.Note("%s", l)
	}
}

// doctorReconcile wants the unit where containers count on it.
func doctorReconcile(_ context.Context, cfg *config.Config, root *disk.Root, r *doctor.Result) {
	cs := container.Open(root, cfg.State)
	ids, err := cs.List()
	if err != nil {
		failed(r, err)
		return
	}
	var restarted []string
	for _, id := range ids {
		if rec, err := cs.Load(id); err == nil && !rec.HostConfig.RestartPolicy.IsNone() {
			restarted = append(restarted, rec.Name)
		}
	}
	installed := ""
	for _, dir := range []string{"/etc/systemd/system/", "/usr/lib/systemd/system/", "/lib/systemd/system/"} {
		if _, err := os.Stat(dir + "conex-reconcile.service"); err == nil {
			installed = dir + "conex-reconcile.service"
			break
		}
	}
	enabled := false
	if _, err := os.Lstat("/etc/systemd/system/multi-user.target.wants/conex-reconcile.service"); err == nil {
		enabled = true
	}
	switch {
	case enabled:
		r.Found = "enabled: containers with a restart policy start at boot"
	case len(restarted) == 0:
		r.Found = "not enabled; no container has a restart policy"
	case installed != "":
		r.Worse(doctor.Degraded, fmt.Sprintf("%s have a restart policy, and conex-reconcile is not enabled: they will not start at boot", strings.Join(restarted, ", ")), "systemctl enable conex-reconcile")
	default:
		r.Worse(doctor.Degraded, fmt.Sprintf("%s have a restart policy, and nothing starts them at boot", strings.Join(restarted, ", ")),
			"make install && systemctl enable conex-reconcile, or run `conex reconcile` at boot")
	}
}
