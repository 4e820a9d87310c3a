{{/* What the schema can't see: values that contradict each other. Each failure says what to set. */}}

{{- define "payload-logger.check" -}}
{{- $config := include "payload-logger.config" . | fromYaml -}}
{{- if $config.Error -}}{{- fail $config.Error -}}{{- end -}}
{{- include "payload-logger.checkMode" (dict "root" . "config" $config) -}}
{{- include "payload-logger.checkSpool" (dict "root" . "config" $config) -}}
{{- include "payload-logger.checkEnvironment" (dict "root" . "config" $config) -}}
{{- include "payload-logger.checkOptions" (dict "root" . "config" $config) -}}
{{- end -}}

{{- define "payload-logger.checkMode" -}}
{{- $values := .root.Values -}}
{{- if eq $values.mode "sidecar" -}}
{{- if not $values.model.image -}}{{- fail "model.image: name the model server's image; or set mode: gateway, to stand before a Service that is there already" -}}{{- end -}}
{{- if $values.gateway.upstream -}}{{- fail "gateway.upstream: belongs to mode: gateway; in mode: sidecar the proxy stands before model.port" -}}{{- end -}}
{{- $ports := list (include "payload-logger.port" (dict "key" "proxy.listen" "value" .config.proxy.listen)) (include "payload-logger.port" (dict "key" "admin.listen" "value" .config.admin.listen)) -}}
{{- if has (printf "%.0f" (float64 $values.model.port)) $ports -}}{{- fail (printf "model.port: %.0f is a port of the proxy, in the same pod; choose another for the model, or another config.proxy.listen" (float64 $values.model.port)) -}}{{- end -}}
{{- if include "payload-logger.customLogging" .root -}}
{{- $folder := dir .config.custom_logging.sdk_config_path -}}
{{- if or (hasPrefix "/var/lib/payload-logger" $folder) (hasPrefix "/etc/payload-logger" $folder) (not (hasPrefix "/" $folder)) (eq $folder "/") -}}{{- fail (printf "config.custom_logging.sdk_config_path: the model's container gets %s as a volume, and nothing else may be in it; leave it out, or choose a folder of its own" $folder) -}}{{- end -}}
{{- end -}}
{{- else -}}
{{- if $values.model.image -}}{{- fail "model.image: belongs to mode: sidecar; in mode: gateway the model is a Service of its own, gateway.upstream" -}}{{- end -}}
{{- if and $values.gateway.upstream ($values.config.proxy | default dict).upstream -}}{{- fail "gateway.upstream and config.proxy.upstream: set one of them" -}}{{- end -}}
{{- if include "payload-logger.customLogging" .root -}}{{- fail "config.data_collector.collections: custom logging needs mode: sidecar; the SDK and the proxy talk over the pod's loopback address, without authentication" -}}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "payload-logger.checkSpool" -}}
{{- $values := .root.Values -}}
{{- $size := include "payload-logger.bytes" $values.spool.size | float64 -}}
{{- $budget := include "payload-logger.bytes" .config.spool.max_bytes | float64 -}}
{{- $outcome := ternary "the volume runs full" "the kubelet evicts the pod" $values.spool.persistence.enabled -}}
{{- if or (eq $budget 0.0) (gt $budget (mulf $size 0.9)) -}}{{- fail (printf "config.spool.max_bytes: %v is more than nine tenths of spool.size (%s): %s before the budget is used up; leave it out, or make spool.size larger" (ternary "no limit" (toString .config.spool.max_bytes) (eq $budget 0.0)) $values.spool.size $outcome) -}}{{- end -}}
{{- $mounts := list "/var/lib/payload-logger" -}}
{{- range $values.extraVolumeMounts -}}{{- $mounts = append $mounts .mountPath -}}{{- end -}}
{{- $local := regexMatch "^(file:|/)" (.config.storage.url | lower) -}}
{{- $paths := dict "spool.path" .config.spool.path -}}
{{- if $local -}}{{- $_ := set $paths "storage.url" (regexReplaceAll "^file:(//(localhost)?)?" .config.storage.url "") -}}{{- end -}}
{{- range $key, $path := $paths -}}
{{- $writable := false -}}
{{- range $mounts -}}{{- if hasPrefix (printf "%s/" (trimSuffix "/" .)) (printf "%s/" (trimSuffix "/" $path)) -}}{{- $writable = true -}}{{- end -}}{{- end -}}
{{- if not $writable -}}{{- fail (printf "config.%s: %s is in no volume, and the root file system is read-only; use a folder in /var/lib/payload-logger, or mount one (extraVolumes, extraVolumeMounts)" $key $path) -}}{{- end -}}
{{- end -}}
{{- if and $local (hasPrefix "/var/lib/payload-logger/" (get $paths "storage.url")) (not $values.spool.persistence.enabled) (not $values.spool.acceptLoss) -}}{{- fail "config.storage.url: the dataset would be on an emptyDir, and end with its pod; name a container of Azure Blob Storage, or set spool.persistence.enabled: true, or, to try it, spool.acceptLoss: true" -}}{{- end -}}
{{- end -}}

{{- define "payload-logger.checkEnvironment" -}}
{{- $computed := list "PROXY_LISTEN" "PROXY_UPSTREAM" "PROXY_DRAIN_SECONDS" "PROXY_TLS_CERTIFICATE" "PROXY_TLS_KEY" "ADMIN_LISTEN" "STORAGE_URL" "SPOOL_PATH" "SPOOL_MAX_BYTES" "CUSTOM_LOGGING_LISTEN" "CUSTOM_LOGGING_SDK_CONFIG_PATH" -}}
{{- range .root.Values.extraEnv -}}
{{- if has (trimPrefix "PAYLOAD_LOGGER_" .name) $computed -}}{{- fail (printf "extraEnv: %s would change what the chart computes with; set the key in config instead" .name) -}}{{- end -}}
{{- if and (hasPrefix "AZURE_STORAGE_" .name) (not (hasSuffix "_FILE" .name)) (hasKey . "value") -}}{{- fail (printf "extraEnv: %s is a secret, and values are no place for one; put it into a Secret, and name that in credentials" .name) -}}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "payload-logger.checkOptions" -}}
{{- $values := .root.Values -}}
{{- if and $values.credentials.secretName (not $values.credentials.secretKey) -}}{{- fail "credentials.secretKey: name the key of the Secret that holds it" -}}{{- end -}}
{{- if and $values.workloadIdentity.enabled $values.serviceAccount.create (not $values.workloadIdentity.clientId) -}}{{- fail "workloadIdentity.clientId: name the client id of the identity that may write" -}}{{- end -}}
{{- if and $values.upstreamCa.configMapName $values.upstreamCa.secretName -}}{{- fail "upstreamCa: set configMapName or secretName" -}}{{- end -}}
{{- if and $values.serviceMonitor.enabled $values.networkPolicy.enabled (not $values.networkPolicy.adminFrom) -}}{{- fail "networkPolicy.adminFrom: name who may scrape the admin port, or the ServiceMonitor gets no answers" -}}{{- end -}}
{{- $budget := $values.podDisruptionBudget -}}
{{- if and $budget.enabled (eq (kindIs "invalid" $budget.minAvailable) (kindIs "invalid" $budget.maxUnavailable)) -}}{{- fail "podDisruptionBudget: set one of minAvailable and maxUnavailable, and the other to null" -}}{{- end -}}
{{- if and $values.autoscaling.enabled (lt (int $values.autoscaling.maxReplicas) (int $values.autoscaling.minReplicas)) -}}{{- fail "autoscaling.maxReplicas: less than autoscaling.minReplicas" -}}{{- end -}}
{{- end -}}
