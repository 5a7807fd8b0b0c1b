package build

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"conex/internal/image"
	"conex/internal/ocispec"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Request says what to build. The zero value of each field is docker build's default.
type Request struct {
	// Context is a folder, or "-": a Dockerfile or a tar (plain or compressed) on Stdin.
	Context string
	Stdin   io.Reader
	// Dockerfile is the file's path, "-" for Stdin; "" is Dockerfile in the context.
	Dockerfile string
	// Contexts are --build-context: what a name in FROM or --from stands for, before stages and images of that name.
	Contexts map[string]string
	// BuildArgs are --build-arg; a nil value is one that was given without a value and is not set in the environment.
	BuildArgs map[string]*string
	// Target is the stage to build, by name or number; "" is the last.
	Target string
	// Platform is the target's os/arch[/variant]; "" is this machine's.
	Platform string
	// NoCache runs every step, NoCacheFilter those of the stages that it names; Pull asks the registry for every base image.
	NoCache       bool
	NoCacheFilter []string
	Pull          bool
	// Labels are added to the image.
	Labels map[string]string
	// Squash is SquashNew, SquashAll or "".
	Squash string

	// Secrets and Agents are what RUN --mount=type=secret and type=ssh show, by id.
	Secrets map[string]Secret
	Agents  map[string]Agent
	// Allow are the entitlements granted: network.host, security.insecure, device.
	Allow []string
	// Network is that of RUN steps without --network: default, none or host.
	Network string
	// AddHosts are lines of /etc/hosts, "name:address"; ShmSize is that of /dev/shm in bytes, 0 for the default; Ulimits are limits of
	// RUN's processes.
	AddHosts []string
	ShmSize  int64
	Ulimits  []specs.POSIXRlimit
	// Memory and CPU limit the cgroup of each RUN, which is made below CgroupParent; nil and "" for no limit and conex's own place.
	Memory       *specs.LinuxMemory
	CPU          *specs.LinuxCPU
	CgroupParent string

	// CacheFrom are caches elsewhere, in which steps are looked for that are not known here.
	CacheFrom []CacheSource
	// Discard leaves no records of steps in the cache, and none of the build in the history.
	Discard bool
	// Names are what the caller calls the image that comes of it; the history has them.
	Names []string
	// Debug is asked what to do about a RUN whose command failed; nil fails the build. One step is asked about at a time; others go on.
	Debug func(context.Context, *Failure) (Decision, error)

	// Display receives events.
	Display Display
	// Export does something with what was built. Nil: nothing, which leaves the steps in the cache.
	Export func(ctx context.Context, x *Export) error
}

// Secret is where a secret's bytes come from: a file, or a variable of the environment. They are read when a step first takes it.
type Secret struct{ File, Env string }

// Agent is an SSH agent: its socket, or private keys to answer for one.
type Agent struct{ Paths []string }

// Result is a finished build.
type Result struct {
	// ID is the image's: the digest of its config.
	ID ocispec.Digest
	// Ref names the build in the history.
	Ref string
	// Cached says that no step ran, and nothing came from a remote.
	Cached bool
	// Made are the layers of the steps that ran.
	Made []ocispec.Digest
}

// Export is what a build made, before anything was done with it.
type Export struct {
	// Image is the config, of which Config are the bytes. Its layers survive a power loss.
	Image  ocispec.Image
	Config []byte
	// Layers are the image's, from the base up; the first Base of them are the base image's.
	Layers []ocispec.Digest
	Base   int
	// From is the image that the target stands on; the zero value for scratch.
	From image.Image
	// Epoch is SOURCE_DATE_EPOCH; nil without one.
	Epoch *time.Time
	// Made is set by Request.Export where it made another image of this one, as Rewritten does.
	Made ocispec.Digest

	b       *Builder
	cache   *cache
	journal *journal
	imports *importer
	// steps are all nodes of the build, tip is the target's last.
	steps []*node
	tip   *node
	// inline is the cache in the config, if there is one.
	inline *CacheConfig
}

// Step shows what an exporter does as a line of the build's display. do may report bytes; what it returns is shown with the line.
func (x *Export) Step(name string, do func(progress func(current, total int64)) (string, error)) error {
	v := x.journal.vertex("", name)
	v.start()
	text, err := do(v.progress)
	if err != nil {
		v.end(Failed, "", err)
		return err
	}
	v.end(Done, text, nil)
	return nil
}

// Replace gives the image another config, as --squash and rewritten times do.
func (x *Export) Replace(img ocispec.Image) error {
	raw, err := json.Marshal(imageWithCache{img, x.inline})
	if err != nil {
		return fmt.Errorf("image config: %w", err)
	}
	x.Image, x.Config, x.Layers = img, raw, img.RootFS.DiffIDs
	return nil
}

// ID is the image's id as it stands.
func (x *Export) ID() ocispec.Digest { return ocispec.FromBytes(x.Config) }
