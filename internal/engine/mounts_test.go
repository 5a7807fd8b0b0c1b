package engine

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"conex/internal/config"
	"conex/internal/container"

	apic "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
)

// resolve is addMounts for a container of an image that has nothing.
func resolve(t *testing.T, e *Engine, hc apic.HostConfig, opts container.Options) (*container.Record, error) {
	t.Helper()
	rec := &container.Record{ID: "x", Config: &apic.Config{}, HostConfig: &hc, Options: opts}
	var made []string
	done, err := e.addMounts(t.Context(), rec, &made)
	if err == nil {
		done()
	}
	return rec, err
}

func TestBinds(t *testing.T) {
	e := newImageEngine(t)
	dir := t.TempDir()
	rec, err := resolve(t, e, apic.HostConfig{Binds: []string{
		dir + ":/x:ro,rslave", dir + "/new:/y/../z", "vol:/v", "vol2:/w:nocopy,ro", dir + ":/x:ro,rslave",
	}}, container.Options{IDMap: map[string]string{"/z": "5:6", "/x": "auto"}})
	if err != nil {
		t.Fatal(err)
	}
	data := func(v string) string { return e.root.Path("volumes", v, "_data") }
	want := []apic.MountPoint{
		{Type: "bind", Source: dir, Destination: "/x", Mode: "ro,rslave", Propagation: "rslave"},
		{Type: "bind", Source: dir + "/new", Destination: "/z", RW: true, Propagation: "rprivate"},
		{Type: "volume", Name: "vol", Source: data("vol"), Destination: "/v", Driver: "local", Mode: "z", RW: true},
		{Type: "volume", Name: "vol2", Source: data("vol2"), Destination: "/w", Driver: "local", Mode: "nocopy,ro"},
	}
	if !slices.Equal(rec.Mounts, want) {
		t.Errorf("got %+v", rec.Mounts)
	}
	if o := rec.More["/z"].Owner; o == nil || *o != (container.Owner{UID: 5, GID: 6}) {
		t.Errorf("%+v", o)
	}
	if o := rec.More["/x"].Owner; o == nil || !o.Source {
		t.Errorf("%+v", o)
	}
	if exists(filepath.Join(dir, "new")) {
		t.Error("create made the source: only a start does")
	}
}

func TestMountsThatAreRefused(t *testing.T) {
	e := newImageEngine(t)
	dir := t.TempDir()
	bind := func(m mount.Mount) apic.HostConfig { return apic.HostConfig{Mounts: []mount.Mount{m}} }
	for want, hc := range map[string]apic.HostConfig{
		"invalid volume specification: ''":              {Binds: []string{""}},
		"invalid volume specification: '/a:ro'":         {Binds: []string{"/a:ro"}},
		"invalid volume specification: '/a:/b:ro:x'":    {Binds: []string{"/a:/b:ro:x"}},
		"invalid mode: nonsense":                        {Binds: []string{"/a:/b:nonsense"}},
		"invalid mode: ro,rw":                           {Binds: []string{"/a:/b:ro,rw"}},
		"invalid mode: rslave,shared":                   {Binds: []string{"/a:/b:rslave,shared"}},
		"invalid mount path: 'b' mount path must be":    {Binds: []string{"/a:b"}},
		"destination can't be '/'":                      {Binds: []string{"/a:/x/.."}},
		"If you intended to pass a host directory":      {Binds: []string{"./a:/b"}},
		"'vol:/b:rslave': invalid mount config for":     {Binds: []string{"vol:/b:rslave"}},
		"'/a:/b:nocopy': invalid mount config for":      {Binds: []string{"/a:/b:nocopy"}},
		"Duplicate mount point: /b":                     {Binds: []string{"/a:/b", "/c:/b/"}},
		"Duplicate mount point: /t":                     {Binds: []string{"/a:/t"}, Tmpfs: map[string]string{"/t": ""}},
		`error looking up volume plugin x: plugin "x"`:  {Binds: []string{"vol:/b"}, VolumeDriver: "x"},
		`invalid tmpfs option ["uppity"]`:               {Tmpfs: map[string]string{"/t": "uppity"}},
		"field Target must not be empty":                bind(mount.Mount{Type: "bind", Source: dir}),
		`for type "bind": field Source must not be emp`: bind(mount.Mount{Type: "bind", Target: "/x"}),
		"bind source path does not exist: /no/such":     bind(mount.Mount{Type: "bind", Source: "/no/such", Target: "/x"}),
		"invalid propagation mode: upwards":             bind(mount.Mount{Type: "bind", Source: dir, Target: "/x", BindOptions: &mount.BindOptions{Propagation: "upwards"}}),
		"!ReadOnly && BindOptions.ReadOnlyNonRecursive": bind(mount.Mount{Type: "bind", Source: dir, Target: "/x", BindOptions: &mount.BindOptions{ReadOnlyNonRecursive: true}}),
		"field BindOptions must not be specified":       bind(mount.Mount{Type: "volume", Target: "/x", BindOptions: &mount.BindOptions{}}),
		`"tmpfs": field Source must not be specified`:   bind(mount.Mount{Type: "tmpfs", Source: "x", Target: "/x"}),
		"must not set Subpath when using anonymous vol": bind(mount.Mount{Type: "volume", Target: "/x", VolumeOptions: &mount.VolumeOptions{Subpath: "a"}}),
		"subpath must be a relative path within the vo": bind(mount.Mount{Type: "volume", Source: "vol", Target: "/x", VolumeOptions: &mount.VolumeOptions{Subpath: "../a"}}),
		`missing required option: "device"`:             bind(mount.Mount{Type: "volume", Target: "/x", VolumeOptions: &mount.VolumeOptions{DriverConfig: &mount.Driver{Options: map[string]string{"type": "nfs"}}}}),
		`"image": field Source must not be empty`:       bind(mount.Mount{Type: "image", Target: "/x"}),
		"No such image: nosuch:latest":                  bind(mount.Mount{Type: "image", Source: "nosuch", Target: "/x"}),
		`"npipe": mount type unknown`:                   bind(mount.Mount{Type: "npipe", Source: "x", Target: "/x"}),
		"No such container: nobody":                     {VolumesFrom: []string{"nobody"}},
		"invalid mode: nocopy":                          {VolumesFrom: []string{"nobody:nocopy"}},
		"volumes-from specification cannot be an empty": {VolumesFrom: []string{""}},
	} {
		if _, err := resolve(t, e, hc, container.Options{}); err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrNotFound) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
	for want, opts := range map[string]container.Options{
		"idmap is for bind mounts and volumes: /nosuch": {IDMap: map[string]string{"/nosuch": "auto"}},
		`invalid idmap "x:1" of /x: neither`:            {IDMap: map[string]string{"/x": "x:1"}},
		`invalid idmap "-1" of /x: neither`:             {IDMap: map[string]string{"/x": "-1"}},
		`invalid idmap "1:2:3" of /x: neithe`:           {IDMap: map[string]string{"/x": "1:2:3"}},
		"overlay is for bind mounts and volumes: /no":   {Overlay: map[string]string{"/nosuch": "keep"}},
		`invalid overlay "some" of /x: neither`:         {Overlay: map[string]string{"/x": "some"}},
		"overlay and idmap exclude each other":          {Overlay: map[string]string{"/x": "keep"}, IDMap: map[string]string{"/x": "auto"}},
	} {
		if _, err := resolve(t, e, apic.HostConfig{Binds: []string{dir + ":/x"}}, opts); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
	nomap := apic.HostConfig{Binds: []string{dir + ":/x"}, UsernsMode: "nomap"}
	if _, err := resolve(t, e, nomap, container.Options{IDMap: map[string]string{"/x": "auto"}}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "--userns nomap exclude each other") {
		t.Errorf("%v", err)
	}
	if names, err := filepath.Glob(e.root.Path("volumes", "*")); err != nil || len(names) != 0 {
		t.Errorf("volumes stayed: %q %v", names, err)
	}
}

func TestUsersMode(t *testing.T) {
	for mode, want := range map[apic.UsernsMode]uint32{"": 0, "host": 0, "auto": 65536, "nomap": 65536, "auto:size=5000": 5000} {
		if _, n, err := usersMode(mode); err != nil || n != want {
			t.Errorf("%s: %d %v", mode, n, err)
		}
	}
	for _, mode := range []apic.UsernsMode{"keep-id", "host:x", "auto:", "auto:size=", "auto:size=0", "auto:size=-1", "auto:uidmapping=0", "auto:size=99999999", "container:x"} {
		if _, n, err := usersMode(mode); mode != "auto:" && !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %d %v", mode, n, err)
		}
	}
	for want, hc := range map[string]apic.HostConfig{
		"privileged mode is incompatible with user namespaces.  You must": {Privileged: true},
		"cannot share the host's network namespace when user":             {NetworkMode: "host"},
		"cannot share the host PID namespace when user namespaces are":    {PidMode: "host"},
		"cannot join the PID namespace of another container":              {PidMode: "container:x"},
	} {
		hc.UsernsMode = "auto"
		if err := validateUsers(t.Context(), nil, &hc); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
		hc.UsernsMode = "host"
		if err := validateUsers(t.Context(), nil, &hc); err != nil {
			t.Errorf("--userns host: %v", err)
		}
	}
}

func TestFreeIDs(t *testing.T) {
	pool := config.IDRange{First: 100_000, Size: 5 << 16} // from 131072, the first multiple
	const k = 1 << 16
	for _, tc := range []struct {
		name  string
		taken []container.IDs
		size  uint32
		want  uint32 // 0: none is free
	}{
		{"the first", nil, k, 2 * k},
		{"behind one", []container.IDs{{First: 2 * k, Size: k}}, k, 3 * k},
		{"between two", []container.IDs{{First: 4 * k, Size: k}, {First: 2 * k, Size: k}}, k, 3 * k},
		{"a gap too small", []container.IDs{{First: 2 * k, Size: k}, {First: 4 * k, Size: 1}}, 2*k - 1, 0},
		{"a large one", []container.IDs{{First: 2 * k, Size: 1}}, 3 * k, 3 * k},
		{"of the host's, at odd places", []container.IDs{{First: 0, Size: 3*k + 5}}, k, 4 * k},
		{"to the end of all ids", []container.IDs{{First: 2 * k, Size: 1<<32 - 1 - 2*k}}, k, 0},
		{"larger than the pool", nil, 5 * k, 0},
	} {
		got, err := freeIDs(pool, tc.taken, tc.size)
		if tc.want == 0 {
			if err == nil {
				t.Errorf("%s: %+v", tc.name, got)
			}
			continue
		}
		if err != nil || got != (container.IDs{First: tc.want, Size: tc.size}) {
			t.Errorf("%s: %+v %v", tc.name, got, err)
		}
	}
}
