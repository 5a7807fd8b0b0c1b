package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"conex/internal/collect"
	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/layers"
	"conex/internal/volume"

	apic "github.com/moby/moby/api/types/container"
	mevents "github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
)

// mounter turns -v, --mount, --tmpfs, --volumes-from and the image's VOLUMEs into a record's mounts.
type mounter struct {
	e      *Engine
	rec    *container.Record
	made   *[]string // volumes that did not exist
	leases []*collect.Lease
	// taken are the destinations of what was asked for by name.
	taken map[string]bool
	// noCopy are volumes that stay as they are, by destination.
	noCopy map[string]bool
	labels map[string]map[string]string
	// options are volume-opt's.
	options map[string]map[string]string
}

// close ends the leases on mounted images, once the record names them.
func (m *mounter) close() {
	for _, l := range m.leases {
		l.Close()
	}
}

// addMounts fills in the record's mounts. It makes the volumes that are new, and adds them to made. The caller calls
// done when the record is written, or given up.
func (e *Engine) addMounts(ctx context.Context, rec *container.Record, made *[]string) (done func(), err error) {
	m := &mounter{e: e, rec: rec, made: made, taken: map[string]bool{}, noCopy: map[string]bool{}, labels: map[string]map[string]string{}, options: map[string]map[string]string{}}
	if err := m.add(ctx); err != nil {
		m.close()
		return nil, err
	}
	return m.close, nil
}

func (m *mounter) add(ctx context.Context) error {
	hc := m.rec.HostConfig
	if err := m.volumesFrom(hc.VolumesFrom); err != nil {
		return err
	}
	for i, b := range hc.Binds {
		if slices.Contains(hc.Binds[:i], b) {
			continue // said twice; Docker's client drops it as well
		}
		p, err := m.bind(b)
		if err != nil {
			return err
		}
		if _, tmpfs := hc.Tmpfs[p.Destination]; tmpfs {
			return invalid("Duplicate mount point: %s", p.Destination)
		}
		if err := m.take(p); err != nil {
			return err
		}
	}
	for _, s := range hc.Mounts {
		p, err := m.mountPoint(ctx, s)
		if err != nil {
			return err
		}
		if err := m.take(p); err != nil {
			return err
		}
	}
	for dst, opts := range hc.Tmpfs {
		if err := checkTmpfs(opts); err != nil {
			return err
		}
		if err := checkTarget(mount.TypeTmpfs, dst); err != nil {
			return err
		}
		p := apic.MountPoint{Type: mount.TypeTmpfs, Destination: path.Clean(dst), RW: true}
		m.more(p.Destination, func(d *container.Mount) { d.Options, d.Flag = opts, true })
		if err := m.take(p); err != nil {
			return err
		}
	}
	// The image's and -v's volumes without a name, where nothing else is mounted.
	var anonymous []string
	for dst := range m.rec.Config.Volumes {
		if err := checkTarget(mount.TypeVolume, dst); err != nil {
			return invalid("invalid volume specification: '%s': %w", dst, err)
		}
		if dst = path.Clean(dst); !slices.ContainsFunc(m.rec.Mounts, func(p apic.MountPoint) bool { return p.Destination == dst }) && !slices.Contains(anonymous, dst) {
			anonymous = append(anonymous, dst)
		}
	}
	slices.Sort(anonymous)
	for _, dst := range anonymous {
		m.put(apic.MountPoint{Type: mount.TypeVolume, Destination: dst, RW: true})
	}
	if err := m.idMaps(); err != nil {
		return err
	}
	if err := m.overlays(); err != nil {
		return err
	}
	m.rec.Anonymous = slices.DeleteFunc(m.rec.Anonymous, func(name string) bool { // what was replaced
		return !slices.ContainsFunc(m.rec.Mounts, func(p apic.MountPoint) bool { return p.Name == name })
	})
	vols := m.e.Volumes()
	for i := range m.rec.Mounts {
		if p := &m.rec.Mounts[i]; p.Type == mount.TypeVolume {
			if err := m.volume(ctx, vols, p); err != nil {
				return err
			}
		}
	}
	return nil
}

// take adds a mount that was asked for at its place; a second one there is an error, one of another container gives way.
func (m *mounter) take(p apic.MountPoint) error {
	if m.taken[p.Destination] {
		return invalid("Duplicate mount point: %s", p.Destination)
	}
	m.taken[p.Destination] = true
	m.put(p)
	return nil
}

// put adds a mount in the place of what was there.
func (m *mounter) put(p apic.MountPoint) {
	at := slices.IndexFunc(m.rec.Mounts, func(o apic.MountPoint) bool { return o.Destination == p.Destination })
	if at < 0 {
		m.rec.Mounts = append(m.rec.Mounts, p)
		return
	}
	m.rec.Mounts[at] = p
}

// more changes what the record has about the mount at dst.
func (m *mounter) more(dst string, change func(*container.Mount)) {
	d := m.rec.More[dst]
	change(&d)
	if m.rec.More == nil {
		m.rec.More = map[string]container.Mount{}
	}
	m.rec.More[dst] = d
}

// volumesFrom takes over the mounts of other containers, as they were resolved for them.
func (m *mounter) volumesFrom(from []string) error {
	cs := m.e.Containers()
	for _, spec := range from {
		if spec == "" {
			return invalid("volumes-from specification cannot be an empty string")
		}
		name, mode, _ := strings.Cut(spec, ":")
		readOnly := false
		for _, o := range strings.Split(mode, ",") {
			switch o {
			case "ro":
				readOnly = true
			case "", "rw", "z", "Z":
			default:
				return invalid("invalid mode: %s", mode)
			}
		}
		id, err := m.e.containerID(name)
		if err != nil {
			return err
		}
		other, err := cs.Load(id)
		if err != nil {
			return classify(err)
		}
		for _, p := range other.Mounts {
			d, known := other.More[p.Destination]
			if d.Flag {
				continue // Docker's list does not have it either
			}
			p.RW = p.RW && !readOnly
			p.Mode = ""
			delete(m.rec.More, p.Destination)
			if known {
				m.more(p.Destination, func(own *container.Mount) { *own = d })
			}
			m.noCopy[p.Destination] = true
			m.put(p)
			if slices.Contains(other.Anonymous, p.Name) {
				m.rec.Anonymous = append(m.rec.Anonymous, p.Name) // whoever is the last to have it takes it along
			}
			if d.Image != "" {
				l, err := collect.Hold(m.e.root, append(slices.Clone(d.Layers), d.Image)...)
				if err != nil {
					return err
				}
				m.leases = append(m.leases, l)
			}
		}
	}
	return nil
}

// volume fills in a volume's name and folder, and makes it when it does not exist. One that is empty gets what the image has in its
// place.
func (m *mounter) volume(ctx context.Context, vols *volume.Store, p *apic.MountPoint) error {
	v := volume.Volume{Name: p.Name, Created: time.Now().UTC(), Labels: m.labels[p.Destination], Options: m.options[p.Destination]}
	if v.Name == "" {
		v.Name, v.Anonymous = disk.RandomID(), true
		m.rec.Anonymous = append(m.rec.Anonymous, v.Name)
	}
	if m.noCopy[p.Destination] && p.Driver != "" { // another container's
		if _, err := os.Lstat(vols.Data(v.Name)); err != nil {
			return fmt.Errorf("volume %s: %w", v.Name, err)
		}
		return nil
	}
	p.Name, p.Driver, p.Source = v.Name, "local", vols.Data(v.Name)
	of := v.Options
	if have, err := vols.Get(v.Name); err == nil {
		of = have.Options
	}
	d := disk.Durable
	if v.Anonymous && m.rec.HostConfig.AutoRemove {
		d = disk.Volatile // a crash of the machine takes it along with its container
	}
	inPlace := of["type"] != "" // what it is filled with lies elsewhere
	var fill func(string) error
	if !m.noCopy[p.Destination] && of["type"] != "tmpfs" { // that is empty again by the start
		fill = func(dir string) error {
			if err := m.e.copyUp(ctx, m.rec, p.Destination, dir, inPlace, d); err != nil {
				return fmt.Errorf("fill volume %s: %w", v.Name, err)
			}
			return nil
		}
	}
	first := fill
	if own := m.rec.More[p.Destination].Owner; inPlace {
		first = nil
	} else if own != nil && !own.Source {
		first = func(dir string) error { // the container's user can write to it
			if err := os.Lchown(dir, int(own.UID), int(own.GID)); err != nil || fill == nil {
				return err
			}
			return fill(dir)
		}
	}
	made, err := vols.Create(v, d, first)
	if err != nil {
		return err
	}
	if made {
		*m.made = append(*m.made, v.Name)
		m.e.volumeEvent(mevents.ActionCreate, v.Name)
	}
	if made && !inPlace {
		return nil
	}
	return vols.Fill(ctx, v.Name, fill)
}

// bindModes are the words of -v's options by kind; of each kind one may be given.
var bindModes = map[string]int{
	"ro": 1, "rw": 1, "z": 2, "Z": 2, "nocopy": 3, "consistent": 4, "cached": 4, "delegated": 4,
	"private": 5, "rprivate": 5, "slave": 5, "rslave": 5, "shared": 5, "rshared": 5,
}

func validMode(mode string) bool {
	var had [6]bool
	for _, o := range strings.Split(mode, ",") {
		kind := bindModes[o]
		if kind == 0 || had[kind] {
			return false
		}
		had[kind] = true
	}
	return true
}

// bind reads -v's "source:destination[:options]". A source that is no path is a volume's name.
func (m *mounter) bind(spec string) (apic.MountPoint, error) {
	parts := strings.SplitN(spec, ":", 4)
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" || parts[1] == "" || len(parts) == 2 && validMode(parts[1]) {
		return apic.MountPoint{}, invalid("invalid volume specification: '%s'", spec)
	}
	mode := ""
	if len(parts) == 3 {
		if mode = parts[2]; !validMode(mode) {
			return apic.MountPoint{}, invalid("invalid mode: %s", mode)
		}
	}
	p := apic.MountPoint{Type: mount.TypeBind, Source: path.Clean(parts[0]), Destination: path.Clean(parts[1]), Mode: mode, RW: true, Propagation: mount.PropagationRPrivate}
	if !path.IsAbs(parts[0]) {
		p.Type, p.Name, p.Source, p.Propagation = mount.TypeVolume, parts[0], "", ""
	}
	if err := checkTarget(p.Type, parts[1]); err != nil {
		return p, invalid("invalid volume specification: '%s': %w", spec, err)
	}
	noCopy := false
	for _, o := range strings.Split(mode, ",") {
		switch bindModes[o] {
		case 1:
			p.RW = o == "rw"
		case 3:
			noCopy = true
		case 5:
			p.Propagation = mount.Propagation(o)
		}
	}
	wrong := func(field string) error {
		return invalid("invalid volume specification: '%s': invalid mount config for type %q: field %s must not be specified", spec, p.Type, field)
	}
	switch {
	case p.Type == mount.TypeBind && noCopy:
		return p, wrong("VolumeOptions")
	case p.Type == mount.TypeVolume && p.Propagation != "":
		return p, wrong("BindOptions")
	case p.Type == mount.TypeBind:
		return p, nil
	}
	if err := checkVolumeName(p.Name); err != nil {
		return p, err
	}
	if d := m.rec.HostConfig.VolumeDriver; d != "" {
		if err := checkVolumeDriver(p.Name, &mount.Driver{Name: d}); err != nil {
			return p, err
		}
	}
	if p.Mode == "" {
		p.Mode = "z"
	}
	m.noCopy[p.Destination] = noCopy
	return p, nil
}

// mountPoint reads --mount.
func (m *mounter) mountPoint(ctx context.Context, s mount.Mount) (apic.MountPoint, error) {
	p := apic.MountPoint{Type: s.Type, Source: s.Source, Destination: path.Clean(s.Target), RW: !s.ReadOnly}
	fail := func(format string, args ...any) (apic.MountPoint, error) {
		return p, invalid("invalid mount config for type %q: %w", s.Type, fmt.Errorf(format, args...))
	}
	for _, o := range []struct {
		of   mount.Type
		set  bool
		name string
	}{
		{mount.TypeBind, s.BindOptions != nil, "BindOptions"}, {mount.TypeVolume, s.VolumeOptions != nil, "VolumeOptions"},
		{mount.TypeImage, s.ImageOptions != nil, "ImageOptions"}, {mount.TypeTmpfs, s.TmpfsOptions != nil, "TmpfsOptions"},
		{mount.TypeCluster, s.ClusterOptions != nil, "ClusterOptions"},
	} {
		if o.set && s.Type != o.of {
			return fail("field %s must not be specified", o.name)
		}
	}
	if err := checkTarget(s.Type, s.Target); err != nil {
		return p, invalid("%w", err)
	}
	switch s.Type {
	case mount.TypeBind:
		return m.bindMount(s, p)
	case mount.TypeTmpfs:
		if s.Source != "" {
			return fail("field Source must not be specified")
		}
		opts, err := tmpfsOptions(s)
		if err != nil {
			return p, err
		}
		m.more(p.Destination, func(d *container.Mount) { d.Options = opts })
	case mount.TypeVolume:
		return m.volumeMount(s, p)
	case mount.TypeImage:
		return m.imageMount(ctx, s, p)
	default:
		return fail("mount type unknown")
	}
	return p, nil
}

func (m *mounter) bindMount(s mount.Mount, p apic.MountPoint) (apic.MountPoint, error) {
	fail := func(format string, args ...any) (apic.MountPoint, error) {
		return p, invalid("invalid mount config for type %q: %w", s.Type, fmt.Errorf(format, args...))
	}
	if s.Source == "" {
		return fail("field Source must not be empty")
	}
	o := mount.BindOptions{}
	if s.BindOptions != nil {
		o = *s.BindOptions
	}
	switch {
	case o.Propagation != "" && !slices.Contains(mount.Propagations, o.Propagation):
		return fail("invalid propagation mode: %s", o.Propagation)
	case !path.IsAbs(s.Source):
		return fail("invalid mount path: '%s' mount path must be absolute", s.Source)
	case !s.ReadOnly && o.ReadOnlyNonRecursive:
		return p, invalid("mount options conflict: !ReadOnly && BindOptions.ReadOnlyNonRecursive")
	case !s.ReadOnly && o.ReadOnlyForceRecursive:
		return p, invalid("mount options conflict: !ReadOnly && BindOptions.ReadOnlyForceRecursive")
	case o.ReadOnlyNonRecursive && o.ReadOnlyForceRecursive:
		return p, invalid("mount options conflict: ReadOnlyNonRecursive && BindOptions.ReadOnlyForceRecursive")
	}
	if _, err := os.Stat(s.Source); err != nil && !o.CreateMountpoint {
		if errors.Is(err, os.ErrNotExist) {
			return fail("bind source path does not exist: %s", s.Source)
		}
		return fail("%w", err)
	}
	p.Source, p.Propagation = path.Clean(s.Source), mount.PropagationRPrivate
	if o.Propagation != "" {
		p.Propagation = o.Propagation
	}
	m.more(p.Destination, func(d *container.Mount) {
		d.NonRecursive, d.WritableBelow, d.MustExist = o.NonRecursive, o.ReadOnlyNonRecursive, !o.CreateMountpoint
	})
	return p, nil
}

func (m *mounter) volumeMount(s mount.Mount, p apic.MountPoint) (apic.MountPoint, error) {
	p.Name, p.Source, p.Mode = s.Source, "", "z"
	if s.Source != "" {
		if err := checkVolumeName(s.Source); err != nil {
			return p, err
		}
	}
	o := s.VolumeOptions
	if o == nil {
		return p, nil
	}
	if err := checkVolumeDriver(p.Name, o.DriverConfig); err != nil {
		return p, err
	}
	if o.DriverConfig != nil && len(o.DriverConfig.Options) > 0 {
		v := volume.Volume{Name: s.Source, Options: o.DriverConfig.Options}
		if err := m.e.checkVolume(&v); err != nil {
			return p, err
		}
		m.options[p.Destination] = v.Options
	}
	m.noCopy[p.Destination] = o.NoCopy
	m.labels[p.Destination] = o.Labels
	if o.Subpath != "" {
		m.noCopy[p.Destination] = true // what the image has is not the whole volume's
		if s.Source == "" {
			return p, invalid("invalid mount config for type %q: must not set Subpath when using anonymous volumes", s.Type)
		}
		return p, m.subpath(p, o.Subpath)
	}
	return p, nil
}

// subpath notes a path in a volume or image.
func (m *mounter) subpath(p apic.MountPoint, sub string) error {
	if !filepath.IsLocal(sub) {
		return invalid("invalid mount config for type %q: subpath must be a relative path within the volume", p.Type)
	}
	m.more(p.Destination, func(d *container.Mount) { d.Subpath = sub })
	return nil
}

// checkVolumeDriver refuses drivers that are not there.
func checkVolumeDriver(name string, d *mount.Driver) error {
	if d == nil || d.Name == "" || d.Name == "local" {
		return nil
	}
	return invalid("create %s: error looking up volume plugin %s: plugin %q not found", name, d.Name, d.Name)
}

// imageMount is a mount of an image, which must be here. Until the record names it, a lease does.
func (m *mounter) imageMount(ctx context.Context, s mount.Mount, p apic.MountPoint) (apic.MountPoint, error) {
	if s.Source == "" {
		return p, invalid("invalid mount config for type %q: field Source must not be empty", s.Type)
	}
	if s.ImageOptions != nil && s.ImageOptions.Subpath != "" {
		if err := m.subpath(p, s.ImageOptions.Subpath); err != nil {
			return p, err
		}
	}
	img, lease, err := m.e.imageFor(ctx, CreateRequest{Config: &apic.Config{Image: s.Source}, Pull: "never"})
	if err != nil {
		return p, classify(err)
	}
	m.leases = append(m.leases, lease)
	p.Name, p.Source, p.RW, p.Propagation = s.Source, string(img.ID), false, mount.PropagationRPrivate
	m.more(p.Destination, func(d *container.Mount) { d.Image, d.Layers = img.ID, img.Layers() })
	return p, nil
}

// idMaps reads idmap=.
func (m *mounter) idMaps() error {
	for dst, val := range m.rec.Options.IDMap {
		dst = path.Clean(dst)
		at := slices.IndexFunc(m.rec.Mounts, func(p apic.MountPoint) bool { return p.Destination == dst })
		if at < 0 || m.rec.Mounts[at].Type != mount.TypeBind && m.rec.Mounts[at].Type != mount.TypeVolume {
			return invalid("idmap is for bind mounts and volumes: %s is none", dst)
		}
		if m.rec.HostConfig.UsernsMode == usernsNomap {
			return invalid("idmap and --userns %s exclude each other: no process of such a container is any user of the host, through no mount", usernsNomap)
		}
		own := container.Owner{Source: true}
		if val != "" && val != "auto" {
			uid, gid, ok := strings.Cut(val, ":")
			if !ok {
				gid = uid
			}
			u, err1 := strconv.ParseUint(uid, 10, 31)
			g, err2 := strconv.ParseUint(gid, 10, 31)
			if err1 != nil || err2 != nil {
				return invalid("invalid idmap %q of %s: neither auto nor UID:GID", val, dst)
			}
			own = container.Owner{UID: uint32(u), GID: uint32(g)}
		}
		m.more(dst, func(d *container.Mount) { d.Owner = &own })
	}
	return nil
}

// checkTarget looks at where something is mounted, in Docker's words and order.
func checkTarget(t mount.Type, target string) error {
	switch {
	case target == "":
		return fmt.Errorf("invalid mount config for type %q: field Target must not be empty", t)
	case path.Clean(target) == "/":
		return fmt.Errorf("invalid mount config for type %q: invalid specification: destination can't be '/'", t)
	case !path.IsAbs(target):
		return fmt.Errorf("invalid mount config for type %q: invalid mount path: '%s' mount path must be absolute", t, target)
	}
	return nil
}

// tmpfsOptions are those of --mount type=tmpfs in the words of --tmpfs.
func tmpfsOptions(s mount.Mount) (string, error) {
	var opts []string
	if s.ReadOnly {
		opts = append(opts, "ro")
	}
	if o := s.TmpfsOptions; o != nil {
		if o.Mode != 0 {
			opts = append(opts, fmt.Sprintf("mode=%o", o.Mode))
		}
		if o.SizeBytes > 0 {
			opts = append(opts, "size="+strconv.FormatInt(o.SizeBytes, 10))
		}
		for _, kv := range o.Options {
			opts = append(opts, strings.Join(kv, "="))
		}
	}
	all := strings.Join(opts, ",")
	return all, checkTmpfs(all)
}

// checkTmpfs refuses options of --tmpfs that the kernel's tmpfs or mount(2) doesn't have.
func checkTmpfs(opts string) error {
	if opts == "" {
		return nil
	}
	flags := []string{"ro", "rw", "exec", "noexec", "suid", "nosuid", "dev", "nodev", "atime", "noatime", "diratime", "nodiratime",
		"relatime", "norelatime", "strictatime", "nostrictatime", "sync", "async", "huge", "private", "rprivate"}
	keys := []string{"size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol", "huge"}
	for _, o := range strings.Split(opts, ",") {
		k, _, hasValue := strings.Cut(o, "=")
		if hasValue && slices.Contains(keys, k) || !hasValue && slices.Contains(flags, k) {
			continue
		}
		return invalid("invalid tmpfs option %q", []string{o})
	}
	return nil
}

// imagesOf are the mounted layers, top first, of the images that are mounted into a container, by destination.
func (e *Engine) imagesOf(ctx context.Context, ls *layers.Store, rec *container.Record) (map[string][]string, error) {
	var out map[string][]string
	for dst, d := range rec.More {
		if d.Image == "" {
			continue
		}
		lower, err := e.imageLower(ctx, ls, d.Layers)
		if err != nil {
			return nil, fmt.Errorf("mount %s: %w", dst, err)
		}
		if out == nil {
			out = map[string][]string{}
		}
		out[dst] = lower
	}
	return out, nil
}
