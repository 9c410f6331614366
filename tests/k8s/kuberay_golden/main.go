// What KubeRay's own code makes of the RayService or RayJob on standard input, as JSON: `made` of
// objects.yaml, without what is empty. With Go 1.26, in a folder of its own:
//
//	go mod init golden && go get github.com/ray-project/kuberay/ray-operator@v1.7.0
//	go run . < object.json
package main

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"strings"

	corev1 "k8s.io/api/core/v1"

	rayv1 "github.com/ray-project/kuberay/ray-operator/apis/ray/v1"
	"github.com/ray-project/kuberay/ray-operator/controllers/ray/common"
	"github.com/ray-project/kuberay/ray-operator/controllers/ray/utils"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func main() {
	ctx := context.Background()
	text := must(io.ReadAll(os.Stdin))
	var kind struct{ Kind string }
	if err := json.Unmarshal(text, &kind); err != nil {
		panic(err)
	}
	made := map[string]any{}
	var service rayv1.RayService
	var job rayv1.RayJob
	cluster := rayv1.RayCluster{}
	switch kind.Kind {
	case "RayService":
		if err := json.Unmarshal(text, &service); err != nil {
			panic(err)
		}
		if err := utils.ValidateRayServiceSpec(&service); err != nil {
			made["invalid"] = err.Error()
		}
		cluster.Spec = service.Spec.RayClusterSpec
		cluster.Name, cluster.Namespace = service.Name+"-abcde", service.Namespace
	case "RayJob":
		if err := json.Unmarshal(text, &job); err != nil {
			panic(err)
		}
		if err := utils.ValidateRayJobSpec(&job); err != nil {
			made["invalid"] = err.Error()
		}
		cluster.Spec = *job.Spec.RayClusterSpec
		cluster.Name, cluster.Namespace = job.Name+"-abcde", job.Namespace
	}
	cluster.UID = "the-uid"
	cluster.Labels = map[string]string{utils.RayOriginatedFromCRDLabelKey: kind.Kind}
	for i := range cluster.Spec.WorkerGroupSpecs {
		group := &cluster.Spec.WorkerGroupSpecs[i]
		if group.RayStartParams == nil {
			group.RayStartParams = map[string]string{}
		}
		group.NumOfHosts = 1
	}

	// As in buildHeadPod and buildWorkerPod of raycluster_controller.go.
	fqdn := utils.GenerateFQDNServiceName(ctx, cluster, cluster.Namespace)
	creator := utils.GetCRDType(kind.Kind)
	head := *cluster.DeepCopy()
	port := common.GetHeadPort(head.Spec.HeadGroupSpec.RayStartParams)
	template := common.DefaultHeadPodTemplate(ctx, head, head.Spec.HeadGroupSpec, utils.PodName(head.Name, rayv1.HeadNode, true), port)
	made["head"] = common.BuildPod(ctx, template, rayv1.HeadNode, head.Spec.HeadGroupSpec.RayStartParams, port,
		utils.IsAutoscalingEnabled(&head.Spec), creator, fqdn, nil, head.Spec.RayVersion)
	workers := []corev1.Pod{}
	for i := range cluster.Spec.WorkerGroupSpecs {
		instance := *cluster.DeepCopy()
		group := instance.Spec.WorkerGroupSpecs[i]
		name := utils.PodName(instance.Name+"-"+group.GroupName, rayv1.WorkerNode, true)
		template := common.DefaultWorkerPodTemplate(ctx, instance, group, name, fqdn, port, "", 0, 0)
		workers = append(workers, common.BuildPod(ctx, template, rayv1.WorkerNode, group.RayStartParams, port,
			utils.IsAutoscalingEnabled(&instance.Spec), creator, fqdn, nil, instance.Spec.RayVersion))
	}
	made["workers"] = workers
	made["clusterHeadService"] = must(common.BuildServiceForHeadPod(ctx, cluster, nil, nil))
	made["role"] = must(common.BuildRole(&cluster))
	if kind.Kind == "RayService" {
		made["headService"] = must(common.BuildHeadServiceForRayService(ctx, service, cluster))
		if svc, err := common.BuildServeServiceForRayService(ctx, service, cluster); err != nil {
			made["serveServiceRefused"] = err.Error()
		} else {
			made["serveService"] = svc
		}
	} else {
		made["headService"] = must(common.BuildHeadServiceForRayJob(ctx, job, cluster))
		job.Status.DashboardURL = fqdn + ":8265"
		job.Status.JobId = job.Name + "-fghij"
		// As in configureSubmitterContainer of rayjob_controller.go.
		made["submitCommand"] = strings.Join(must(common.BuildJobSubmitCommand(&job, rayv1.K8sJobMode)), " ")
		made["submitterTemplate"] = common.GetSubmitterTemplate(&job.Spec, &cluster.Spec)
	}
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", " ")
	out.SetEscapeHTML(false)
	if err := out.Encode(made); err != nil {
		panic(err)
	}
}
