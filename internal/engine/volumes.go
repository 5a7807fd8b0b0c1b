package engine

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/linux/quota"
	"conex/internal/volume"

	apic "github.com/moby/moby/api/types/container"
	mevents "github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
	apiv "github.com/moby/moby/api/types/volume"
)

// anonymousLabel is how Docker marks volumes that nobody gave a name.
const anonymousLabel = "com.docker.volume.anonymous"

// VolumeCreateRequest asks for a volume.
type VolumeCreateRequest struct {
	// Name is the volume's name; empty makes an anonymous one.
	Name string
	// Driver is "local", or empty for it.
	Driver string
	// Options are the driver's: type, o, device, size.
	Options map[string]string
	Labels  map[string]string
}

// CreateVolume makes a volume. One of that name that exists is as good, whatever its options, as with Docker.
func (e *Engine) CreateVolume(_ context.Context, req VolumeCreateRequest) (apiv.Volume, error) {
	v := volume.Volume{Name: req.Name, Created: time.Now().UTC(), Labels: req.Labels, Options: req.Options}
	if v.Name == "" {
		v.Name, v.Anonymous = disk.RandomID(), true
	}
	if err := checkVolumeDriver(v.Name, &mount.Driver{Name: req.Driver}); err != nil {
		return apiv.Volume{}, err
	}
	if len(v.Name) == 1 { // a container makes one all the same, with Docker too
		return apiv.Volume{}, invalid("create %s: volume name is too short, names should be at least two alphanumeric characters", v.Name)
	}
	if err := e.checkVolume(&v); err != nil {
		return apiv.Volume{}, err
	}
	vols := e.Volumes()
	made, err := vols.Create(v, disk.Durable, nil)
	if err != nil {
		return apiv.Volume{}, classify(err)
	}
	if !made {
		return e.InspectVolume(v.Name)
	}
	e.volumeEvent(mevents.ActionCreate, v.Name)
	return describeVolume(vols, &v), nil
}

// checkVolume checks a new volume's name and options, and whether its size can be had.
func (e *Engine) checkVolume(v *volume.Volume) error {
	if v.Name != "" {
		if err := checkVolumeName(v.Name); err != nil {
			return err
		}
	}
	if err := volume.CheckOptions(v.Options); err != nil {
		return invalid("create %s: %w", v.Name, err)
	}
	size, err := v.Size()
	if err != nil {
		return invalid("create %s: %w", v.Name, err)
	}
	if size == 0 {
		return nil
	}
	if err := quota.Check(e.root.Path("volumes")); err != nil {
		if errors.Is(err, quota.ErrNotSupported) {
			return invalid("create %s: quota size requested but no quota support: %w; put the data folder (--root) on ext4 or xfs mounted with prjquota, or use one in memory: "+
				"--opt type=tmpfs --opt device=tmpfs --opt o=size=%s", v.Name, quota.ErrNotSupported, v.Options["size"])
		}
		return err
	}
	return nil
}

// checkVolumeName is volume.CheckName for who may have meant a path, in Docker's words.
func checkVolumeName(name string) error {
	if err := volume.CheckName(name); err != nil {
		return invalid("create %s: %w. If you intended to pass a host directory, use absolute path", name, err)
	}
	return nil
}

// InspectVolume describes a volume as Docker does.
func (e *Engine) InspectVolume(name string) (apiv.Volume, error) {
	vols := e.Volumes()
	v, err := vols.Get(name)
	if err != nil {
		return apiv.Volume{}, volumeError("get", name, err)
	}
	return describeVolume(vols, &v), nil
}

func describeVolume(vols *volume.Store, v *volume.Volume) apiv.Volume {
	out := apiv.Volume{CreatedAt: v.Created.Local().Format(time.RFC3339), Driver: "local", Labels: v.Labels, Mountpoint: vols.Data(v.Name), Name: v.Name, Options: v.Options, Scope: "local"}
	if v.Mounted() {
		out.Mountpoint = vols.MountPoint(v.Name)
	}
	if v.Anonymous {
		out.Labels = maps.Clone(v.Labels)
		if out.Labels == nil {
			out.Labels = map[string]string{}
		}
		out.Labels[anonymousLabel] = ""
	}
	return out
}

// volumeError puts an error about a volume into Docker's words. A name that no volume can have is one that no volume has.
func volumeError(what, name string, err error) error {
	if name == "" {
		return invalid("invalid volume name or ID: value is empty")
	}
	if errors.Is(err, volume.ErrNotFound) || errors.Is(err, volume.ErrName) {
		return &kindError{ErrNotFound, &volumeMissing{what, name}}
	}
	return err
}

type volumeMissing struct{ what, name string }

func (e *volumeMissing) Error() string { return e.what + " " + e.name + ": no such volume" }

func (e *volumeMissing) Is(target error) bool { return target == volume.ErrNotFound }

// ListVolumes lists volumes, by name. Filters are Docker's: dangling, driver, label, name. Those whose records can't be read are an error
// beside the list.
func (e *Engine) ListVolumes(ctx context.Context, filters map[string][]string) ([]apiv.Volume, error) {
	match, err := e.volumeFilter(ctx, filters)
	if err != nil {
		return nil, err
	}
	vols := e.Volumes()
	names, err := vols.List()
	if err != nil {
		return nil, err
	}
	var out []apiv.Volume
	var errs []error
	for _, name := range names {
		v, err := vols.Get(name)
		if err != nil {
			if !errors.Is(err, volume.ErrNotFound) {
				errs = append(errs, err)
			}
			continue
		}
		if d := describeVolume(vols, &v); match(&d) {
			out = append(out, d)
		}
	}
	slices.SortFunc(out, func(a, b apiv.Volume) int { return cmp.Compare(a.Name, b.Name) })
	return out, errors.Join(errs...)
}

func (e *Engine) volumeFilter(_ context.Context, filters map[string][]string) (func(*apiv.Volume) bool, error) {
	var tests []func(*apiv.Volume) bool
	for key, vals := range filters {
		switch key {
		case "name":
			var res []*regexp.Regexp
			for _, v := range vals {
				re, err := regexp.Compile(v)
				if err != nil {
					re = regexp.MustCompile(regexp.QuoteMeta(v))
				}
				res = append(res, re)
			}
			tests = append(tests, func(v *apiv.Volume) bool {
				return slices.ContainsFunc(res, func(re *regexp.Regexp) bool { return re.MatchString(v.Name) })
			})
		case "driver":
			tests = append(tests, func(v *apiv.Volume) bool { return slices.Contains(vals, v.Driver) })
		case "label":
			tests = append(tests, func(v *apiv.Volume) bool { return hasLabels(v.Labels, vals) })
		case "label!":
			tests = append(tests, func(v *apiv.Volume) bool {
				return !slices.ContainsFunc(vals, func(l string) bool { return hasLabels(v.Labels, []string{l}) })
			})
		case "dangling":
			used, err := e.volumeUsers()
			if err != nil {
				return nil, err
			}
			for _, val := range vals {
				want, err := strconv.ParseBool(val)
				if err != nil {
					return nil, invalid("invalid filter 'dangling=%s'", val)
				}
				tests = append(tests, func(v *apiv.Volume) bool { return (len(used[v.Name]) == 0) == want })
			}
		default:
			return nil, invalid("invalid filter '%s'", key)
		}
	}
	return func(v *apiv.Volume) bool {
		return !slices.ContainsFunc(tests, func(t func(*apiv.Volume) bool) bool { return !t(v) })
	}, nil
}

// volumeUsers are the ids of the containers that have a volume, by its name: what their records say, so it is true whatever has crashed.
func (e *Engine) volumeUsers() (map[string][]string, error) {
	cs := e.Containers()
	ids, err := cs.List()
	if err != nil {
		return nil, err
	}
	users := map[string][]string{}
	for _, id := range ids {
		r, err := cs.Load(id)
		if errors.Is(err, container.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		add := func(name string) {
			if name != "" && !slices.Contains(users[name], id) {
				users[name] = append(users[name], id)
			}
		}
		for _, m := range r.Mounts {
			if m.Type == mount.TypeVolume {
				add(m.Name)
			}
		}
		for _, name := range r.Anonymous {
			add(name)
		}
	}
	return users, nil
}

// inUse is Docker's error about a volume that containers have, nil if none has it.
func inUse(what, name string, users []string) error {
	if len(users) == 0 {
		return nil
	}
	return conflict("%s %s: volume is in use - [%s]", what, name, strings.Join(users, ", "))
}

// VolumeRemoveRequest asks to delete a volume, or one of its snapshots (VOLUME@SNAPSHOT).
type VolumeRemoveRequest struct {
	Name string
	// Force makes a volume that does not exist no error.
	Force bool
	// Snapshots takes a volume's snapshots along; without, one that has some stays.
	Snapshots bool
}

// RemoveVolume deletes a volume that no container has.
func (e *Engine) RemoveVolume(ctx context.Context, req VolumeRemoveRequest) error {
	name, snapshot, err := cutSnapshot(req.Name)
	if err != nil {
		return err
	}
	if snapshot != "" {
		return e.removeSnapshot(ctx, name, snapshot)
	}
	vols := e.Volumes()
	if _, err := vols.Get(req.Name); err != nil {
		if err = volumeError("get", req.Name, err); req.Force && errors.Is(err, ErrNotFound) {
			return nil
		}
		return err
	}
	var trash string
	err = volume.WhenFree(ctx, func() error {
		l, err := vols.LockUnused(ctx) // nobody makes a container that has it meanwhile
		if err != nil {
			return err
		}
		defer l.Release()
		if err := e.checkUnused("remove", req.Name); err != nil {
			return err
		}
		if kept, err := vols.Snapshots(req.Name); err != nil {
			return err
		} else if len(kept) > 0 && !req.Snapshots {
			return conflict("remove %s: volume has %s: remove them first (volume rm %s@%s), or give --snapshots", req.Name, plural(len(kept), "snapshot"), req.Name, kept[0].Name)
		}
		trash, err = vols.TryTrash(req.Name)
		return err
	})
	if err != nil || trash == "" { // otherwise somebody else was faster
		return err
	}
	e.volumeEvent(mevents.ActionDestroy, req.Name)
	return os.RemoveAll(trash)
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return strconv.Itoa(n) + " " + what + "s"
}

func (e *Engine) checkUnused(what, name string) error {
	users, err := e.volumeUsers()
	if err != nil {
		return err
	}
	return inUse(what, name, users[name])
}

// RenameVolume gives a volume another name. Containers name their volumes, so one that a container has, running or not, keeps its.
func (e *Engine) RenameVolume(ctx context.Context, from, to string) error {
	vols := e.Volumes()
	if err := volume.CheckName(to); err != nil {
		return classify(err)
	}
	err := volume.WhenFree(ctx, func() error {
		l, err := vols.LockUnused(ctx)
		if err != nil {
			return err
		}
		defer l.Release()
		if _, err := vols.Get(from); err != nil {
			return volumeError("rename", from, err)
		}
		if err := e.checkUnused("rename", from); err != nil {
			return err
		}
		alone, err := vols.TryAlone(from)
		if err != nil {
			return volumeError("rename", from, err)
		}
		defer alone.Release()
		return classify(vols.Rename(from, to))
	})
	if err != nil {
		return err
	}
	e.volumeEvent(mevents.ActionDestroy, from)
	e.volumeEvent(mevents.ActionCreate, to)
	return nil
}

// volumeRunning are the containers with a volume that run now.
func (e *Engine) volumeRunning(ctx context.Context, name string) ([]*container.Snapshot, error) {
	all, err := e.snapshots(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(n *container.Snapshot) bool {
		return n.Alive() == nil || !slices.ContainsFunc(n.Record.Mounts, func(m apic.MountPoint) bool { return m.Type == mount.TypeVolume && m.Name == name })
	}), nil
}
