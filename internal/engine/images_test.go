package engine

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"conex/internal/build"
	"conex/internal/collect"
	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/ocispec"

	apic "github.com/moby/moby/api/types/container"
	apii "github.com/moby/moby/api/types/image"
)

func TestImport(t *testing.T) {
	e := newImageEngine(t)
	raw := tarOf(t, map[string]string{"etc/motd": "hello", "bin/sh": "x"})
	file := filepath.Join(t.TempDir(), "rootfs.tar.gz")
	if err := os.WriteFile(file, gzipped(t, raw), 0o600); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(http.FileServer(http.Dir(filepath.Dir(file))))
	t.Cleanup(s.Close)
	for name, req := range map[string]ImportRequest{
		"stdin":      {Source: "-", Stdin: bytes.NewReader(raw)},
		"stdin zstd": {Source: "-", Stdin: bytes.NewReader(zstded(t, raw)), Message: "my own"},
		"file":       {Source: file, Reference: "mine:1", Changes: []string{`CMD ["/bin/sh"]`, "ENV A=b"}},
		"url":        {Source: s.URL + "/rootfs.tar.gz", Platform: "linux/arm64"},
	} {
		id, err := e.Import(bg, req)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		r, err := e.InspectImage(bg, id, "")
		if err != nil || r.ID != id || !slices.Equal(r.RootFS.Layers, []string{string(ocispec.FromBytes(raw))}) || r.Size != 6 || r.Os != "linux" {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
		switch name {
		case "file":
			if !slices.Equal(r.RepoTags, []string{"mine:1"}) || !slices.Equal(r.Config.Cmd, []string{"/bin/sh"}) || !slices.Equal(r.Config.Env, []string{"A=b"}) || r.Comment != "Imported from "+file {
				t.Errorf("%+v", r)
			}
		case "url":
			if r.Architecture != "arm64" {
				t.Error(r.Architecture)
			}
		case "stdin zstd":
			if r.Comment != "my own" {
				t.Error(r.Comment)
			}
		}
	}
	if l := entries(t, e, "layers"); len(l) != 1 {
		t.Errorf("equal content exists once, but layers holds %v", l)
	}
	wantEmpty(t, e, "staging", "trash", "leases")
}

func TestImportRefuses(t *testing.T) {
	e := newImageEngine(t)
	for name, c := range map[string]struct {
		req  ImportRequest
		want string
	}{
		"missing file": {ImportRequest{Source: "/no/such/file"}, "no such file"},
		"no tar":       {ImportRequest{Source: "-", Stdin: strings.NewReader(strings.Repeat("no tar at all ", 100))}, "no tar, or damaged at its beginning"},
		"bad change":   {ImportRequest{Source: "-", Stdin: bytes.NewReader(tarOf(t, nil)), Changes: []string{"RUN x"}}, "RUN is not a valid change command"},
		"bad name":     {ImportRequest{Source: "-", Stdin: bytes.NewReader(tarOf(t, nil)), Reference: "Bad"}, "must be lowercase"},
		"no stdin":     {ImportRequest{Source: "-"}, "there is none"},
		"cut gzip":     {ImportRequest{Source: "-", Stdin: bytes.NewReader(gzipped(t, tarOf(t, map[string]string{"a": "b"}))[:40])}, "unexpected end"},
	} {
		if id, err := e.Import(bg, c.req); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %s, %v", name, id, err)
		}
	}
	wantEmpty(t, e, "images", "images/by-id", "layers", "blobs/sha256", "staging", "trash", "leases")
}

// imported makes an image of one file and tags it.
func imported(t *testing.T, e *Engine, content string, changes []string, tags ...string) string {
	t.Helper()
	id, err := e.Import(bg, ImportRequest{Source: "-", Stdin: bytes.NewReader(tarOf(t, map[string]string{"file": content})), Changes: changes})
	if err != nil {
		t.Fatal(err)
	}
	for _, tag := range tags {
		if err := e.Tag(bg, id, tag); err != nil {
			t.Fatal(err)
		}
	}
	return id
}

func TestRemoveImage(t *testing.T) {
	e := newImageEngine(t)
	id := imported(t, e, "1", nil, "tag", "other:2")
	layer := string(ocispec.FromBytes(tarOf(t, map[string]string{"file": "1"})))
	for _, c := range []struct {
		name  string
		force bool
		want  []apii.DeleteResponse
		err   string
	}{
		{"nope", false, nil, "No such image: nope:latest"},
		{id, false, nil, "conflict: unable to delete " + id[7:19] + " (must be forced) - image is referenced in multiple repositories"},
		{"tag", false, []apii.DeleteResponse{{Untagged: "tag:latest"}}, ""},
		{"tag", false, nil, "No such image: tag:latest"},
		{"other:2", false, []apii.DeleteResponse{{Untagged: "other:2"}, {Deleted: id}, {Deleted: layer}}, ""},
	} {
		got, err := e.RemoveImage(bg, c.name, RemoveImageRequest{Force: c.force})
		if (err == nil) != (c.err == "") || err != nil && err.Error() != c.err || !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, %v", c.name, got, err)
		}
	}
	wantEmpty(t, e, "images", "images/by-id", "layers", "blobs/sha256", "staging", "trash", "leases")

	id = imported(t, e, "2", nil, "x", "y", "y:2")
	got, err := e.RemoveImage(bg, id[7:20], RemoveImageRequest{Force: true})
	if err != nil || len(got) != 5 || got[0].Untagged != "x:latest" || got[3].Deleted != id {
		t.Errorf("by id, forced: %v, %v", got, err)
	}
	wantEmpty(t, e, "images", "images/by-id", "layers", "blobs/sha256")
}

// TestRemoveImagePulled removes the last tag of a pulled image: its digest goes along, as in Docker.
func TestRemoveImagePulled(t *testing.T) {
	host := memoryRegistry(t)
	e := newImageEngine(t)
	base := tarOf(t, map[string]string{"base": "b"})
	d := newPushed(t, base, tarOf(t, map[string]string{"a": "1"})).push(t, host, "p", "1")
	newPushed(t, base, tarOf(t, map[string]string{"a": "2"})).push(t, host, "p", "2")
	for _, tag := range []string{"1", "2"} {
		if _, _, err := e.Pull(bg, PullRequest{Reference: host + "/p:" + tag}); err != nil {
			t.Fatal(err)
		}
	}
	got, err := e.RemoveImage(bg, host+"/p:1", RemoveImageRequest{})
	if err != nil || len(got) != 4 || got[0].Untagged != host+"/p:1" || got[1].Untagged != host+"/p@"+string(d.Digest) || got[2].Deleted == "" {
		t.Errorf("%v, %v", got, err)
	}
	if l := entries(t, e, "layers"); len(l) != 2 {
		t.Errorf("the shared base must stay with the other image's layer: %v", l)
	}
}

func TestSweepSparesLeases(t *testing.T) {
	e := newImageEngine(t)
	id := imported(t, e, "1", nil, "a")
	open, err := collect.NewLease(e.Root())
	if err != nil {
		t.Fatal(err)
	}
	layer := ocispec.FromBytes(tarOf(t, map[string]string{"file": "1"}))
	if got, err := e.RemoveImage(bg, "a", RemoveImageRequest{}); err != nil || !slices.Equal(got, []apii.DeleteResponse{{Untagged: "a:latest"}, {Deleted: id}}) {
		t.Fatalf("under an open lease: %v, %v", got, err)
	}
	if l := entries(t, e, "layers"); len(l) != 1 || !collect.Pending(e.Root()) {
		t.Fatalf("layers %v, pending %v", l, collect.Pending(e.Root()))
	}
	held, err := collect.Hold(e.Root(), layer)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.closeLease(bg, open); err != nil { // sweeps what was pending
		t.Fatal(err)
	}
	if l := entries(t, e, "layers"); len(l) != 1 || collect.Pending(e.Root()) {
		t.Fatalf("held layer: %v, pending %v", l, collect.Pending(e.Root()))
	}
	wantEmpty(t, e, "blobs/sha256")
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	res, err := e.sweep(bg)
	if err != nil || !slices.Equal(res.Layers, []ocispec.Digest{layer}) || res.Bytes <= 0 {
		t.Fatalf("%+v, %v", res, err)
	}
	wantEmpty(t, e, "layers", "blobs/sha256", "leases", "trash")
}

// TestSweepSparesBuildCache removes an image whose layer a cached build step made: the step must go on hitting.
func TestSweepSparesBuildCache(t *testing.T) {
	e := newImageEngine(t)
	id := imported(t, e, "1", nil)
	layer := ocispec.FromBytes(tarOf(t, map[string]string{"file": "1"}))
	dir := e.Root().Path("buildcache", "def", "ab")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(dir, "abcd")
	if err := disk.WriteJSON(record, build.Record{Key: "abcd", Kind: "run", Layer: layer}, disk.Volatile); err != nil {
		t.Fatal(err)
	}
	if got, err := e.RemoveImage(bg, id, RemoveImageRequest{}); err != nil || !slices.Equal(got, []apii.DeleteResponse{{Deleted: id}}) {
		t.Fatalf("%v, %v", got, err)
	}
	if l := entries(t, e, "layers"); len(l) != 1 {
		t.Fatalf("layers %v", l)
	}
	if err := os.Remove(record); err != nil {
		t.Fatal(err)
	}
	if _, err := e.sweep(bg); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, e, "layers", "blobs/sha256")
}

func TestListImages(t *testing.T) {
	e := newImageEngine(t)
	one := imported(t, e, "1", []string{"LABEL tier=web keep=1"}, "web", "example.com/team/web:v1")
	two := imported(t, e, "22", []string{"LABEL tier=db"}, "db:14")
	three := imported(t, e, "333", nil)
	for name, c := range map[string]struct {
		req  ImagesRequest
		want []string
	}{
		"all":            {ImagesRequest{}, []string{three, two, one}},
		"dangling":       {ImagesRequest{Filters: map[string][]string{"dangling": {"true"}}}, []string{three}},
		"not dangling":   {ImagesRequest{Filters: map[string][]string{"dangling": {"false"}}}, []string{two, one}},
		"label":          {ImagesRequest{Filters: map[string][]string{"label": {"tier"}}}, []string{two, one}},
		"label value":    {ImagesRequest{Filters: map[string][]string{"label": {"tier=web", "keep"}}}, []string{one}},
		"no such label":  {ImagesRequest{Filters: map[string][]string{"label": {"tier=web", "other"}}}, nil},
		"before":         {ImagesRequest{Filters: map[string][]string{"before": {"db:14"}}}, []string{one}},
		"since":          {ImagesRequest{Filters: map[string][]string{"since": {one[7:19]}}}, []string{three, two}},
		"between":        {ImagesRequest{Filters: map[string][]string{"since": {"web"}, "before": {three}}}, []string{two}},
		"reference":      {ImagesRequest{Filters: map[string][]string{"reference": {"d*", "none"}}}, []string{two}},
		"reference path": {ImagesRequest{Filters: map[string][]string{"reference": {"example.com/*/web"}}}, []string{one}},
		"argument":       {ImagesRequest{Reference: "web"}, []string{one}},
		"full name":      {ImagesRequest{Reference: "docker.io/library/db"}, []string{two}},
		"wrong tag":      {ImagesRequest{Reference: "db:15"}, nil},
		"until":          {ImagesRequest{Filters: map[string][]string{"until": {"1h"}}}, nil},
		"until now":      {ImagesRequest{Filters: map[string][]string{"until": {time.Now().Add(time.Minute).Format(time.RFC3339)}}}, []string{three, two, one}},
	} {
		sums, err := e.ListImages(bg, c.req)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got []string
		for _, s := range sums {
			got = append(got, s.ID)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
		if name == "argument" && !slices.Equal(sums[0].RepoTags, []string{"web:latest"}) {
			t.Errorf("%s: names that were not asked for: %v", name, sums[0].RepoTags)
		}
	}
	for key, val := range map[string]string{"colour": "red", "dangling": "maybe", "before": "nope", "until": "never", "reference": "[a"} {
		if _, err := e.ListImages(bg, ImagesRequest{Filters: map[string][]string{key: {val}}}); !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrNotFound) {
			t.Errorf("%s=%s was accepted", key, val)
		}
	}
}

func TestHistory(t *testing.T) {
	host := memoryRegistry(t)
	e := newImageEngine(t)
	p := newPushed(t, tarOf(t, map[string]string{"a": "12345"}), tarOf(t, map[string]string{"b": "1"}), tarOf(t, map[string]string{"c": "123"}))
	p.config.History = p.config.History[:3] // layer, ENV, layer: the third layer has no line
	p.push(t, host, "h", "latest")
	img, _, err := e.Pull(bg, PullRequest{Reference: host + "/h"})
	if err != nil {
		t.Fatal(err)
	}
	items, err := e.History(bg, host+"/h", "")
	if err != nil || len(items) != 4 {
		t.Fatalf("%+v, %v", items, err)
	}
	var sizes []int64
	for _, it := range items {
		sizes = append(sizes, it.Size)
	}
	if !slices.Equal(sizes, []int64{3, 1, 0, 5}) || items[0].ID != string(img.ID) || items[1].ID != "<missing>" || items[3].CreatedBy != "layer 0" ||
		!slices.Equal(items[0].Tags, []string{host + "/h:latest"}) || items[3].Created != time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).Unix() {
		t.Errorf("%+v", items)
	}
}

// TestRemoveImageInUse has containers on an image: stopped ones need force, a running one never lets go.
func TestRemoveImageInUse(t *testing.T) {
	e := newImageEngine(t)
	id := imported(t, e, "1", nil, "a", "b")
	layer := ocispec.FromBytes(tarOf(t, map[string]string{"file": "1"}))
	cs := e.Containers()
	rec := &container.Record{ID: disk.RandomID(), Name: "user", Created: time.Now(), ImageID: ocispec.Digest(id), Layers: []ocispec.Digest{layer},
		Config: &apic.Config{}, HostConfig: &apic.HostConfig{}}
	if err := cs.Create(rec, nil); err != nil {
		t.Fatal(err)
	}
	refuse := func(name string, force bool, want string) {
		t.Helper()
		got, err := e.RemoveImage(bg, name, RemoveImageRequest{Force: force})
		if !errors.Is(err, image.ErrInUse) || !errors.Is(err, ErrConflict) || err.Error() != want || got != nil {
			t.Errorf("%s, force %v: %v, %v", name, force, got, err)
		}
	}
	// One of two tags may go.
	if got, err := e.RemoveImage(bg, "b", RemoveImageRequest{}); err != nil || len(got) != 1 {
		t.Fatalf("%v, %v", got, err)
	}
	refuse("a", false, fmt.Sprintf("conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s", "a", rec.ID[:12], id[7:19]))
	refuse(id, false, fmt.Sprintf("conflict: unable to delete %s (must be forced) - image is being used by stopped container %s", id[7:19], rec.ID[:12]))
	// We are its monitor: we hold the lock as long as it runs.
	monitor, err := cs.Lock(rec.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer monitor.Release()
	if err := cs.SetState(rec.ID, &container.State{Status: container.Running, BootID: disk.BootID()}); err != nil {
		t.Fatal(err)
	}
	refuse(id, true, fmt.Sprintf("conflict: unable to delete %s (cannot be forced) - image is being used by running container %s", id[7:19], rec.ID[:12]))
	// Its name may be forced away; the image stays, dangling.
	if got, err := e.RemoveImage(bg, "a", RemoveImageRequest{Force: true}); err != nil || !slices.Equal(got, []apii.DeleteResponse{{Untagged: "a:latest"}}) {
		t.Fatalf("%v, %v", got, err)
	}
	if err := cs.ClearState(rec.ID); err != nil {
		t.Fatal(err)
	}
	monitor.Release()
	// Forced by id the image goes; the layer stays for the container.
	if got, err := e.RemoveImage(bg, id, RemoveImageRequest{Force: true}); err != nil || !slices.Equal(got, []apii.DeleteResponse{{Deleted: id}}) {
		t.Fatalf("%v, %v", got, err)
	}
	if l := entries(t, e, "layers"); len(l) != 1 {
		t.Fatalf("the container's layer: %v", l)
	}
	if _, err := cs.Remove(rec.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := e.sweep(bg); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, e, "layers", "blobs/sha256", "images/by-id")
}
